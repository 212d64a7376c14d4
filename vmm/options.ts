// The command line: what people write, checked with zod, turned into plain options. Touches nothing of the system.

import { parseArgs } from "node:util";
import { z } from "zod";
import { CPUS_MAX } from "./boot/acpi.js";
import { UsageError } from "./errors.js";

/** Policies that are built; the contract names two more (hypercalls/abi.ts). */
const POLICIES = ["strict", "pinned"] as const;
export type DmaPolicy = (typeof POLICIES)[number];

export interface Assignment {
  /** As written; vfio/sysfs.ts parses it. */
  readonly bdf: string;
  /** Device number on the guest's bus 0. */
  readonly guestSlot?: number;
  readonly policy: DmaPolicy;
  /** The device shares no IOVAs with the others. */
  readonly ownDomain: boolean;
}

export interface Options {
  readonly image?: string;
  readonly kernel?: string;
  readonly initrd?: string;
  readonly cmdline?: string;
  readonly cpus: number;
  readonly memoryBytes: number;
  readonly assignments: readonly Assignment[];
  readonly stats: boolean;
  readonly statsDir?: string;
  readonly reboot: boolean;
}

export const MIN_MEMORY_BYTES = 16 * 2 ** 20;
const DEFAULT_MEMORY = "512M";

export const HELP = `vmm: runs a Linux guest on /dev/kvm and gives it real PCI devices without pinning its memory

Usage: vmm [OPTIONS] [IMAGE]

IMAGE is recognised by its content: a unified kernel image (PE with .linux, .initrd, .cmdline) or a bzImage.
The guest's serial console is this terminal; Ctrl-A X leaves, Ctrl-A Ctrl-A sends a Ctrl-A.

The guest:
  --cpus N             vCPUs, 1 to ${CPUS_MAX} (default 1)
  --memory SIZE        guest RAM, such as 512M or 8G (default ${DEFAULT_MEMORY}); a plain number is MiB.
                       Memory the guest does not touch costs the host nothing.
  --kernel FILE        kernel (bzImage), instead of the one in IMAGE
  --initrd FILE        initial RAM disk, instead of the one in IMAGE
  --cmdline TEXT       kernel command line, instead of the one in IMAGE
  --no-reboot          end when the guest reboots, instead of starting it again

Devices:
  --assign BDF[,KEY=VALUE…]
                       give the guest the PCI device BDF of this host, for example 0000:02:00.0; repeatable.
                       It must be bound to vfio-pci.
                         guest=SLOT   device number on the guest's PCI bus, 1 to 31 (default: the next free one)
                         dma=POLICY   for this device, instead of --dma
                         domain=own   share no bus addresses with other devices
  --dma POLICY         which guest memory assigned devices reach (default strict):
                         strict   the pages that the guest's drivers have mapped at this moment, and no others;
                                  the guest needs the module pvdma.ko, without it devices reach nothing
                         pinned   all of guest RAM, pinned at start, as other VMMs do; the guest needs no module

Figures:
  --stats              print all counters at the end, one "name value" a line on standard error
  --stats-dir DIR      keep them as files of one number each in DIR while the guest runs
                       (default: pvdma/PID in $XDG_RUNTIME_DIR or /run, gone when the guest ends)

  --help, --version

Exit status: 0 the guest powered off or was left with Ctrl-A X; 1 something failed; 2 the command line is wrong.

Example:
  modprobe vfio-pci
  echo vfio-pci > /sys/bus/pci/devices/0000:02:00.0/driver_override
  echo 0000:02:00.0 > /sys/bus/pci/drivers/nvme/unbind
  echo 0000:02:00.0 > /sys/bus/pci/drivers_probe
  vmm --assign 0000:02:00.0 guest.img
`;

const UNITS: Readonly<Record<string, number>> = {
  K: 2 ** 10,
  M: 2 ** 20,
  G: 2 ** 30,
  T: 2 ** 40,
  "": 2 ** 20,
};

const size = z.string().transform((text, context) => {
  const match = /^(\d+)([KMGT]?)(?:i?B)?$/i.exec(text);
  if (match === null) {
    context.addIssue("not a size; give a number with K, M, G or T, such as 512M");
    return z.NEVER;
  }
  return Number(match[1]) * UNITS[match[2]!.toUpperCase()]!;
});

const wholeNumber = (first: number, last: number) =>
  z
    .string()
    .regex(/^\d+$/, `not a whole number from ${first} to ${last}`)
    .transform(Number)
    .refine((value) => value >= first && value <= last, `not a whole number from ${first} to ${last}`);

const policy = z.enum(POLICIES, { error: `not a policy; there are ${POLICIES.join(" and ")}` });

const assignmentKeys = z.strictObject({
  guest: wholeNumber(1, 31).optional(),
  dma: policy.optional(),
  domain: z.literal("own", { error: "the only value is own" }).optional(),
});

const memory = size
  .refine(
    (bytes) => bytes >= MIN_MEMORY_BYTES,
    `too small; a guest needs at least ${MIN_MEMORY_BYTES / 2 ** 20}M`,
  )
  .refine((bytes) => bytes % 2 ** 20 === 0, "not a whole number of MiB")
  .refine((bytes) => bytes < 2 ** 43, "too large; it has to be less than 8T");

/** Checks `text` and names the option in the error. */
function checked<T>(schema: z.ZodType<T>, option: string, text: unknown, shown: string): T {
  const result = schema.safeParse(text);
  if (result.success) return result.data;
  const issue = result.error.issues[0]!;
  const unknownKey = issue.code === "unrecognized_keys" ? `unknown key ${issue.keys[0]}` : undefined;
  const where = issue.path.length > 0 ? ` ${issue.path.join(".")}:` : "";
  throw new UsageError(`${option} ${shown}:${where} ${unknownKey ?? issue.message}`);
}

function parseAssignment(text: string, defaultPolicy: DmaPolicy): Assignment {
  const [bdf = "", ...pairs] = text.split(",");
  if (bdf === "") throw new UsageError(`--assign ${text}: names no device; give a BDF such as 0000:02:00.0`);
  const keys: Record<string, string> = {};
  for (const pair of pairs) {
    const [key = "", value] = pair.split(/=(.*)/s);
    if (value === undefined) throw new UsageError(`--assign ${text}: ${pair} is not KEY=VALUE; see --help`);
    if (Object.hasOwn(keys, key)) throw new UsageError(`--assign ${text}: ${key} is given twice`);
    keys[key] = value;
  }
  const { guest, dma, domain } = checked(assignmentKeys, "--assign", keys, text);
  return {
    bdf,
    ...(guest === undefined ? {} : { guestSlot: guest }),
    policy: dma ?? defaultPolicy,
    ownDomain: domain === "own",
  };
}

/** What the command line asks for: to run a guest, or to print something and end. */
export type Command = { readonly run: Options } | { readonly print: "help" | "version" };

/** Parses the arguments after the program's name; throws a UsageError of one line. */
export function parseCommandLine(args: readonly string[]): Command {
  let parsed: ReturnType<typeof parse>;
  try {
    parsed = parse(args);
  } catch (error) {
    // Node's messages are a sentence about the option, sometimes followed by advice about "--".
    throw new UsageError(`${(error as Error).message.split(". ")[0]}; see --help`);
  }
  const { values, positionals } = parsed;
  if (values.help) return { print: "help" };
  if (values.version) return { print: "version" };
  if (positionals.length > 1) {
    throw new UsageError(
      `${positionals[1]}: only one image can be given, and ${positionals[0]} already is; see --help`,
    );
  }
  const image = positionals[0];
  if (image === undefined && values.kernel === undefined) {
    throw new UsageError("nothing to run; give an image or --kernel, see --help");
  }
  const dma = checked(policy, "--dma", values.dma, values.dma);
  return {
    run: {
      ...(image === undefined ? {} : { image }),
      ...(values.kernel === undefined ? {} : { kernel: values.kernel }),
      ...(values.initrd === undefined ? {} : { initrd: values.initrd }),
      ...(values.cmdline === undefined ? {} : { cmdline: values.cmdline }),
      ...(values["stats-dir"] === undefined ? {} : { statsDir: values["stats-dir"] }),
      cpus: checked(wholeNumber(1, CPUS_MAX), "--cpus", values.cpus, values.cpus),
      memoryBytes: checked(memory, "--memory", values.memory, values.memory),
      assignments: values.assign.map((text) => parseAssignment(text, dma)),
      stats: values.stats,
      reboot: !values["no-reboot"],
    },
  };
}

const parse = (args: readonly string[]) =>
  parseArgs({
    args: [...args],
    allowPositionals: true,
    options: {
      assign: { type: "string", multiple: true, default: [] },
      dma: { type: "string", default: "strict" },
      cpus: { type: "string", default: "1" },
      memory: { type: "string", default: DEFAULT_MEMORY },
      kernel: { type: "string" },
      initrd: { type: "string" },
      cmdline: { type: "string" },
      "no-reboot": { type: "boolean", default: false },
      stats: { type: "boolean", default: false },
      "stats-dir": { type: "string" },
      help: { type: "boolean", default: false },
      version: { type: "boolean", default: false },
    },
  });
