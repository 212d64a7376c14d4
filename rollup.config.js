// Two entries: the command and the code each vCPU's Worker runs. What is in node_modules stays there
// (koffi and ref-napi carry native prebuilds), everything of ours becomes plain ES modules in dist/.
const external = (id) => id.startsWith("node:") || /^(koffi|ref-napi|zod)(\/|$)/.test(id);

export default {
  input: { vmm: "build/vmm/main.js", vcpu: "build/vmm/vcpu.js" },
  external,
  output: { dir: "dist", format: "es", chunkFileNames: "[name].js", sourcemap: true },
};
