// Three entries: the command, and the code that the Workers of vCPUs and of emulated devices run. What is in node_modules stays there
// (koffi and ref-napi carry native prebuilds), everything of ours becomes plain ES modules in dist/.
const external = (id) => id.startsWith("node:") || /^(koffi|ref-napi|zod)(\/|$)/.test(id);

export default {
  input: {
    vmm: "build/vmm/main.js",
    vcpu: "build/vmm/vcpu.js",
    "device-thread": "build/vmm/emul/device-thread.js",
  },
  external,
  output: { dir: "dist", format: "es", chunkFileNames: "[name].js", sourcemap: true },
};
