// `npm run lab`: boots the virtual host L1, runs a command in it on the user's terminal, hands back its exit status.

import { existsSync, truncateSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { parseArgs } from "node:util";
import { scratchDir } from "./cache.js";
import { bindVfio, type SpawnOptions, shellQuote } from "./host.js";
import { bootL1, type L1Options, l1Bdf } from "./l1.js";
import { type KernelSeries, kernelSeries } from "./packages.js";

const help = `Boots a virtual host (L1) with an IOMMU, VFIO and KVM and runs a command in it.

usage: npm run lab -- [OPTIONS] [--] [COMMAND...]

  --kernel 6.1|6.12     L1's kernel (default 6.12)
  --memory SIZE         L1's memory, such as 3G or 512M (default 3G)
  --cpus N              L1's processors (default 1)
  --disk FILE           raw file behind the NVMe controller ${l1Bdf.nvme0} (default: an empty 64 MiB one)
  --devices LIST        more devices, by comma:
                          nvme1   a second NVMe controller, ${l1Bdf.nvme1}
                          edu     QEMU's edu, a DMA engine with a 28-bit mask, ${l1Bdf.edu}
                          e1000e  a network card, ${l1Bdf.e1000e}
                          pair    NVMe and network card in one IOMMU group, ${l1Bdf.pair.join(" and ")}
  --vfio BDF            bind this device to vfio-pci first; may be given again
  --entry-limit N       VFIO mappings per container before MAP_DMA fails with ENOSPC
  --help

One COMMAND word is taken as a shell command line, several as one command. Without any: a shell.
The command sees this machine's files, read-only, by their paths; /tmp and /run are L1's own, gone with it.
$LAB_SHARE is a directory that both sides can write, until the command ends. On a terminal, Ctrl-] ends everything at once.

examples:
  npm run lab
  npm run lab -- --vfio ${l1Bdf.nvme0} -- ls -l /dev/vfio
  npm run lab -- --kernel 6.1 'dmesg | grep DMAR'
`;

function usage(problem: string): never {
  process.stderr.write(`lab: ${problem} (see npm run lab -- --help)\n`);
  process.exit(2);
}

function parse() {
  try {
    return parseArgs({
      allowPositionals: true,
      options: {
        kernel: { type: "string", default: "6.12" },
        memory: { type: "string", default: "3G" },
        cpus: { type: "string", default: "1" },
        disk: { type: "string" },
        devices: { type: "string", default: "" },
        vfio: { type: "string", multiple: true, default: [] },
        "entry-limit": { type: "string" },
        help: { type: "boolean", default: false },
      },
    });
  } catch (error) {
    return usage((error as Error).message);
  }
}

function integer(name: string, text: string): number {
  return /^\d{1,9}$/.test(text) && Number(text) > 0
    ? Number(text)
    : usage(`--${name} ${text}: not a number above 0`);
}

function mebibytes(text: string): number {
  const match = /^(\d{1,6})([GM])$/i.exec(text) ?? usage(`--memory ${text}: want a size such as 3G or 512M`);
  return Number(match[1]) * (match[2]!.toUpperCase() === "G" ? 1024 : 1);
}

const { values, positionals } = parse();
if (values.help) {
  process.stdout.write(help);
  process.exit(0);
}
const kernel =
  kernelSeries.find((series) => series === values.kernel) ??
  usage(`--kernel ${values.kernel}: want ${kernelSeries.join(" or ")}`);
const files = scratchDir();
const say = (line: string): void => void process.stderr.write(`lab: ${line}\n`);

function blankDisk(name: string): { file: string } {
  const file = join(files.path, name);
  writeFileSync(file, "");
  truncateSync(file, 64 << 20);
  return { file };
}

const wanted = values.devices.split(",").filter((device) => device !== "");
for (const device of wanted) {
  if (!["nvme1", "edu", "e1000e", "pair"].includes(device))
    usage(`--devices ${device}: want nvme1, edu, e1000e or pair`);
}
if (values.disk !== undefined && !existsSync(values.disk)) usage(`--disk ${values.disk}: no such file`);

const options: L1Options = {
  kernel: kernel satisfies KernelSeries,
  memoryMiB: mebibytes(values.memory),
  cpus: integer("cpus", values.cpus),
  nvme0: values.disk === undefined ? blankDisk("nvme0") : { file: values.disk },
  edu: wanted.includes("edu"),
  e1000e: wanted.includes("e1000e"),
  ...(wanted.includes("nvme1") && { nvme1: blankDisk("nvme1") }),
  ...(wanted.includes("pair") && { pair: blankDisk("pair") }),
  ...(values["entry-limit"] !== undefined && { entryLimit: integer("entry-limit", values["entry-limit"]) }),
  say,
};

const terminal = process.stdin.isTTY && process.stdout.isTTY;
const shell = terminal ? "PS1='lab:\\w# ' exec bash --norc -i" : "exec sh";
const command =
  positionals.length === 0
    ? shell
    : positionals.length === 1
      ? positionals[0]!
      : positionals.map(shellQuote).join(" ");

try {
  say(`booting L1: kernel ${kernel}, ${options.memoryMiB} MiB, ${options.cpus} processors`);
  const l1 = await bootL1(options);
  say(`up after ${(l1.bootMs / 1000).toFixed(1)} s`);
  for (const bdf of values.vfio) await bindVfio(l1, bdf);
  const io: SpawnOptions = {
    cwd: process.cwd(),
    env: { LAB_SHARE: l1.shareDir },
    ...(terminal && { pty: { rows: process.stdout.rows, columns: process.stdout.columns } }),
    onOutput: (bytes, stream) => process[stream].write(bytes),
  };
  const child = await l1.spawn(command, io);
  if (terminal) process.stdin.setRawMode(true);
  process.stdin.on("data", (bytes: Buffer) => {
    if (terminal && bytes.includes(0x1d)) process.exit(130); // what is at exit cleans up
    child.write(bytes);
  });
  process.stdin.on("end", () => child.end());
  try {
    process.exitCode = await child.exited;
  } finally {
    if (terminal) process.stdin.setRawMode(false);
    process.stdin.destroy();
  }
  await l1.close();
} catch (error) {
  say((error as Error).message);
  process.exitCode = 1;
} finally {
  files.remove();
}
