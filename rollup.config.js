import { readFileSync } from "node:fs";
import { fileURLToPath } from "node:url";

// Three entries: the command, and the code that the Workers of vCPUs and of emulated devices run. Everything of ours
// becomes plain ES modules in dist/. koffi and ref-napi carry native prebuilds and stay in node_modules. zod comes
// along, without the parts that are not used: it is some eighty files, half of them other languages' messages, which a
// start would read one by one.
const external = (id) => id.startsWith("node:") || /^(koffi|ref-napi)(\/|$)/.test(id);

/** Where a package has its ES modules, as Node finds them. */
const fromPackages = {
  name: "from-packages",
  resolveId: (id) => (id === "zod" ? fileURLToPath(import.meta.resolve(id)) : null),
};

const zodLicence = readFileSync("node_modules/zod/LICENSE", "utf8").trim();
const banner = ({ moduleIds }) =>
  moduleIds.some((id) => id.includes("/node_modules/zod/")) ? `/*! zod\n\n${zodLicence}\n*/` : "";

export default {
  input: {
    vmm: "build/vmm/main.js",
    vcpu: "build/vmm/vcpu.js",
    "device-thread": "build/vmm/emul/device-thread.js",
  },
  external,
  plugins: [fromPackages],
  output: { dir: "dist", format: "es", chunkFileNames: "[name].js", banner, sourcemap: true },
};
