// The command line: what people write, checked with zod, turned into plain options. Touches nothing of the system.

import { parseArgs } from "node:util";
import { z } from "zod";
import type { PolicyName } from "../hypercalls/abi.js";
import { HUGE_PAGE_BYTES, PAGE_BYTES } from "../hypercalls/addresses.js";
import { GRANULE_MAX_BYTES } from "../hypercalls/cached.js";
import { INJECTION_RULES_MAX } from "../hypercalls/injection.js";
import { MODELS, modelNamed } from "../iommu-emul/models.js";
import type { SoftIommuConfig } from "../iommu-emul/shared.js";
import { CPUS_MAX } from "./boot/acpi.js";
import {
  type DeviceName,
  EMULATED,
  type EmulatedName,
  emulatedName,
  parseDeviceName,
} from "./device-name.js";
import { errorMessage, UsageError } from "./errors.js";
import type { HugePages } from "./guest-memory.js";
import { handleOf, type InjectSpec, parseInjectSpec } from "./inject-spec.js";
import { checked, checkedPairs, issueText, readPairs, size, sizeText, wholeNumber } from "./schemas.js";
import { type Bdf, parseBdf } from "./vfio/sysfs.js";

/** From what costs a guest least to what lets devices reach least, and the one that does neither. */
const POLICIES = ["cached", "lazy", "strict", "pinned"] as const satisfies readonly PolicyName[];
const DEFAULT_POLICY: PolicyName = "cached";

interface AnyAssignment {
  readonly name: DeviceName;
  /** Device number on the guest's bus 0. */
  readonly guestSlot?: number;
  readonly policy: PolicyName;
  /** The device shares no IOVAs with the others. */
  readonly ownDomain: boolean;
  /** Most guest memory that may be pinned for it, in bytes; 0: no limit of its own. */
  readonly limitBytes: number;
}

/** A device of this host. */
export interface VfioAssignment extends AnyAssignment {
  readonly kind: "vfio";
  readonly name: Bdf;
}

/** One that the VMM emulates: a model of models.ts, and what its parse() made of the keys that are its own. */
export interface EmulatedAssignment extends AnyAssignment {
  readonly kind: "emulated";
  readonly name: EmulatedName;
  readonly model: string;
  readonly modelOptions: unknown;
}

export type Assignment = VfioAssignment | EmulatedAssignment;

/** Limits of the IOMMU behind emulated devices, of each of its domains. */
export type SoftIommuLimits = Pick<SoftIommuConfig, "entries" | "lockedBytesMax">;

export interface Options {
  readonly image?: string;
  readonly kernel?: string;
  readonly initrd?: string;
  readonly cmdline?: string;
  readonly cpus: number;
  readonly memoryBytes: number;
  readonly assignments: readonly Assignment[];
  /** Most guest memory that may be pinned for all devices, in bytes; 0: no limit. */
  readonly limitBytes: number;
  /** What policy cached maps at a time, in bytes. */
  readonly granuleBytes: number;
  /** After which it gives back what nobody uses; 0: only when there is need. */
  readonly idleSeconds: number;
  /** What RAM is made of; left out: pages of 4 KiB. */
  readonly hugePages?: HugePages;
  readonly softIommu: SoftIommuLimits;
  readonly injections: readonly InjectSpec[];
  readonly stats: boolean;
  readonly statsDir?: string;
  readonly reboot: boolean;
}

export const MIN_MEMORY_BYTES = 16 * 2 ** 20;
const DEFAULT_MEMORY = "512M";
const DEFAULT_GRANULE = "64K";
const HUGE_PAGES = ["hugetlb", "thp"] as const satisfies readonly HugePages[];
const DEFAULT_IDLE = "30";

/** The models and their own keys. */
const modelsHelp = (): string =>
  MODELS.flatMap(({ name, help }) => [`emul:${name}`, ...help.map((line) => `  ${line}`)])
    .map((line) => `${" ".repeat(25)}${line}`)
    .join("\n");

export const HELP = `vmm: runs a Linux guest on /dev/kvm and gives it PCI devices without pinning its memory

Usage: vmm [OPTIONS] [IMAGE]

IMAGE is recognised by its content: a unified kernel image (PE with .linux, .initrd, .cmdline) or a bzImage.
The guest's serial console is this terminal; Ctrl-A X leaves, Ctrl-A Ctrl-A sends a Ctrl-A.

The guest:
  --cpus N             vCPUs, 1 to ${CPUS_MAX} (default 1)
  --memory SIZE        guest RAM, such as 512M or 8G (default ${DEFAULT_MEMORY}); a plain number is MiB.
                       Memory the guest does not touch costs the host nothing.
  --hugepages KIND     RAM of pages of 2 MiB: hugetlb takes them from those that the host has reserved, all at once; thp
                       lets the kernel make them where it can. Policy cached then maps 2M at a time
  --kernel FILE        kernel (bzImage), instead of the one in IMAGE
  --initrd FILE        initial RAM disk, instead of the one in IMAGE
  --cmdline TEXT       kernel command line, instead of the one in IMAGE
  --no-reboot          end when the guest reboots (exit status 0) or triple-faults (1), instead of starting it again

Devices:
  --assign BDF[,KEY=VALUE…]
                       give the guest the PCI device BDF of this host, for example 0000:02:00.0; repeatable.
                       It must be bound to vfio-pci.
                         guest=SLOT   device number on the guest's PCI bus, 1 to 31 (default: the next free one)
                         dma=POLICY   for this device, instead of --dma
                         domain=own   share no bus addresses with other devices
  --assign emul:MODEL[,KEY=VALUE…]
                       give the guest a PCI device that this program emulates, behind an IOMMU in software: same guest,
                       same module, no IOMMU, device or privilege needed. repeatable; the second of a model is called
                       emul:MODEL.1, the next emul:MODEL.2, wherever a device is named. The keys above, and of
${modelsHelp()}
  --dma POLICY         which guest memory assigned devices reach (default ${DEFAULT_POLICY}, and strict for devices that are
                       known not to address all of RAM). Without the module pvdma.ko in the guest: none, but with pinned.
                         cached   pages stay mapped when a driver unmaps them, until nobody has used them for a while
                                  or there is need: a map of such a page costs the guest nothing. Devices reach what
                                  was used for DMA lately, to read and to write. Needs devices that can address all
                                  of RAM
                         lazy     the pages that the guest's drivers have mapped, and for some 10 ms (lazy_ms of the
                                  module) those that they had: unmaps are made many at a time, and who maps the same
                                  buffer, or list of buffers, again meanwhile makes no call
                         strict   the pages that the guest's drivers have mapped at this moment, and no others
                         pinned   all of guest RAM, pinned at start, as other VMMs do; the guest needs no module

  --dma-limit SIZE[,DEVICE]
                       most guest memory that may be pinned for DMA at a time, for the whole VM or for one assigned
                       device; repeatable. A multiple of 4K; a plain number is bytes. A map that does not fit is
                       refused, and the guest's driver is told so: it waits until others are unmapped. (Policy cached
                       gives back first what nobody uses, and policy lazy what is idle.)
  --dma-granule SIZE   what policy cached maps at a time, 4K to 2M, a power of two (default ${DEFAULT_GRANULE}, 2M with
                       --hugepages): larger ones take fewer calls and fewer mappings of the IOMMU, and pin more memory
                       than is used
  --dma-idle SECONDS   policy cached gives back what nobody has used for SECONDS, at the latest after twice that time;
                       0 to 86400, 0: only when there is need (default ${DEFAULT_IDLE})
  --emul-iommu KEY=VALUE[,KEY=VALUE…]
                       limits of the IOMMU behind emulated devices, for each of its domains, as a host may have them;
                       not with policy pinned, which maps all of RAM:
                         entries=N    most mappings at a time, 1 to 1048576 (default 65535), like dma_entry_limit of
                                      vfio_iommu_type1
                         locked=SIZE  most memory that is mapped at a time (default: no limit), like the limit of
                                      locked memory (ulimit -l); a multiple of 4K, a plain number is bytes

Failures on demand, for testing how drivers take them:
  --inject CALL[,KEY=VALUE…]
                       make calls of the guest's drivers fail or take long; repeatable, up to ${INJECTION_RULES_MAX} rules, and
                       changeable while the guest runs (see --tell). CALL is map (pages and lists), unmap or
                       is-assigned (which a driver's device asks once, before its driver begins). Which calls:
                         device=NAME  those of this assigned device, such as 02:00.0 or emul:edu (default: of all)
                         above=SIZE   those of more bytes than this; a plain number is bytes
                         skip=N       not the first N of them
                       and of these, one of
                         every=N      every Nth (default: 1, all of them)
                         p=F          each with probability F, such as 0.01; seed=N chooses which, and the same
                                      seed the same ones
                         next=N       the next N
                         for=MS       those of the next MS milliseconds
                       whereupon
                         burst=N      the calls that follow share its fate, N in all (default 1)
                         errno=E      it fails as if the host had said ENOSPC (default), ENOMEM or EAGAIN
                         delay=MS     it is done, but takes MS milliseconds longer; up to 10000
                       Only calls that are made can fail: use dma=strict. Under policy cached unmaps make none, and
                       maps make one each while there is a rule for map; under lazy a map that finds its buffer idle
                       makes none, and one that meets a limit is made again if anything is idle (burst=2 strikes both)
                       What is injected is counted apart from real failures: see "injected" in the figures.

Figures, and a running guest:
  --stats              print all counters at the end, one "name value" a line on standard error
  --stats-dir DIR      keep them as files of one number each in DIR while the guest runs
                       (default: pvdma/PID in $XDG_RUNTIME_DIR or /run, gone when the guest ends)
  --tell DIR COMMAND…  tell the VMM whose statistics directory is DIR, through the socket "control" in it, and print
                       its answer. Commands:
                         inject CALL[,KEY=VALUE…]   add a rule, as --inject does
                         inject                     list the rules: how many calls each saw, how many it struck
                         uninject N|all             remove a rule
                         help

  --help, --version

Exit status: 0 the guest powered off or was left with Ctrl-A X; 1 something failed; 2 the command line is wrong.

Examples:
  modprobe vfio-pci
  echo vfio-pci > /sys/bus/pci/devices/0000:02:00.0/driver_override
  echo 0000:02:00.0 > /sys/bus/pci/drivers/nvme/unbind
  echo 0000:02:00.0 > /sys/bus/pci/drivers_probe
  vmm --assign 0000:02:00.0 guest.img

  Every fifth map of that guest fails from now on, after ten seconds none any more:
  vmm --tell /run/pvdma/4711 inject map,every=5,errno=ENOMEM
  sleep 10
  vmm --tell /run/pvdma/4711 inject          # rule 1: map,every=5,errno=ENOMEM (matched 5210, struck 1042)
  vmm --tell /run/pvdma/4711 uninject all
`;

const policy = z.enum(POLICIES, {
  error: `not a policy; there are ${POLICIES.join(", ").replace(/, (\w+)$/, " and $1")}`,
});

const hugePagesKind = z.enum(HUGE_PAGES, { error: `not a kind; there are ${HUGE_PAGES.join(" and ")}` });

const assignmentKeys = z.strictObject({
  guest: wholeNumber(1, 31).optional(),
  dma: policy.optional(),
  domain: z.literal("own", { error: "the only value is own" }).optional(),
});

const memory = size(2 ** 20)
  .refine(
    (bytes) => bytes >= MIN_MEMORY_BYTES,
    `too small; a guest needs at least ${MIN_MEMORY_BYTES / 2 ** 20}M`,
  )
  .refine((bytes) => bytes % 2 ** 20 === 0, "not a whole number of MiB")
  .refine((bytes) => bytes < 2 ** 43, "too large; it has to be less than 8T");

const dmaLimit = size(1)
  .refine((bytes) => bytes >= PAGE_BYTES, "too small; it takes at least a page, 4K")
  .refine((bytes) => bytes % PAGE_BYTES === 0, "not a whole number of pages of 4K")
  .refine(Number.isSafeInteger, "too large");

const granule = size(1)
  .refine((bytes) => bytes >= PAGE_BYTES && bytes <= GRANULE_MAX_BYTES, "4K to 2M are possible")
  .refine((bytes) => Number.isInteger(Math.log2(bytes)), "not a power of two");

const softIommuKeys = z.strictObject({
  entries: wholeNumber(1, 2 ** 20).optional(),
  locked: dmaLimit.optional(),
});

type Unlimited<A> = A extends Assignment ? Omit<A, "limitBytes"> : never;
/** An assignment of which the limit is not known yet. */
type ParsedAssignment = Unlimited<Assignment>;

/** `before` are the devices that are assigned already: an emulated one's name depends on them. */
function parseAssignment(
  text: string,
  defaultPolicy: PolicyName | undefined,
  before: readonly ParsedAssignment[],
): ParsedAssignment {
  const [device = "", ...pairs] = text.split(",");
  if (device === "") {
    throw new UsageError(
      `--assign ${text}: names no device; give a BDF such as 0000:02:00.0, or ${EMULATED}${MODELS[0]!.name}`,
    );
  }
  if (device.startsWith(EMULATED)) return parseEmulated(text, device, pairs, defaultPolicy, before);
  const keys = checkedPairs(assignmentKeys, "--assign", text, pairs);
  return { kind: "vfio", name: parseBdf(device), ...commonOptions(keys, defaultPolicy ?? DEFAULT_POLICY) };
}

const commonOptions = (
  { guest, dma, domain }: z.output<typeof assignmentKeys>,
  defaultPolicy: PolicyName,
) => ({
  ...(guest === undefined ? {} : { guestSlot: guest }),
  policy: dma ?? defaultPolicy,
  ownDomain: domain === "own",
});

/** Keys that every device has are taken out, the others are the model's. */
function parseEmulated(
  text: string,
  device: string,
  pairs: readonly string[],
  defaultPolicy: PolicyName | undefined,
  before: readonly ParsedAssignment[],
): ParsedAssignment {
  const name = device.slice(EMULATED.length);
  const model = modelNamed(name);
  if (model === undefined) {
    const known = MODELS.map((each) => EMULATED + each.name).join(", ");
    throw new UsageError(`--assign ${text}: there is no ${device}; emulated are ${known}`);
  }
  const all = [...readPairs("--assign", text, pairs)];
  const isOurs = (key: string) => Object.hasOwn(assignmentKeys.shape, key);
  const ours = Object.fromEntries(all.filter(([key]) => isOurs(key)));
  const theirs = Object.fromEntries(all.filter(([key]) => !isOurs(key)));
  const keys = checked(assignmentKeys, "--assign", ours, text);
  let modelOptions: unknown;
  try {
    modelOptions = model.parse(theirs);
  } catch (error) {
    const why = error instanceof z.ZodError ? issueText(error) : ` ${errorMessage(error)}`;
    throw new UsageError(`--assign ${text}:${why}`);
  }
  const others = before.filter((each) => each.kind === "emulated" && each.model === name).length;
  const common = commonOptions(keys, defaultPolicy ?? model.policy ?? DEFAULT_POLICY);
  return { kind: "emulated", name: emulatedName(name, others), model: name, modelOptions, ...common };
}

/** The limits that --dma-limit gives: of each device, in order, and with index -1 of the whole VM. */
function parseDmaLimits(
  texts: readonly string[],
  assignments: readonly ParsedAssignment[],
  memoryBytes: number,
  granuleBytes: number,
): Map<number, number> {
  const assigned = assignments.map(({ name }) => name);
  const limits = new Map<number, number>();
  for (const text of texts) {
    const [bytesText = "", ...nameText] = text.split(",");
    const about = `--dma-limit ${text}`;
    const bytes = checked(dmaLimit, "--dma-limit", bytesText, text);
    const index =
      nameText.length === 0 ? -1 : handleOf(parseDeviceName(nameText.join(",")), assigned, about) - 1;
    if (limits.has(index)) {
      throw new UsageError(
        `${about}: ${index < 0 ? "the VM" : assigned[index]} has a limit already; give one`,
      );
    }
    limits.set(index, bytes);
    const limited = assignments.filter((_, i) => index === i || index < 0);
    const pinned = limited.find((each) => each.policy === "pinned" && bytes < memoryBytes);
    if (pinned !== undefined) {
      throw new UsageError(
        `${about}: too small for ${pinned.name}, whose policy pinned pins all ${sizeText(memoryBytes)} of RAM; ` +
          "raise it or use --dma strict",
      );
    }
    const cached = limited.find((each) => each.policy === "cached" && bytes < granuleBytes);
    if (cached !== undefined) {
      throw new UsageError(
        `${about}: too small for ${cached.name}, whose policy cached maps ${sizeText(granuleBytes)} at a time; ` +
          "raise it or lower --dma-granule",
      );
    }
  }
  return limits;
}

function parseSoftIommu(texts: readonly string[], assignments: readonly ParsedAssignment[]): SoftIommuLimits {
  if (texts.length === 0) return {};
  const text = texts.join(",");
  const { entries, locked } = checkedPairs(softIommuKeys, "--emul-iommu", text, text.split(","));
  const behind = assignments.filter(({ kind }) => kind === "emulated");
  if (behind.length === 0) {
    throw new UsageError(`--emul-iommu ${text}: no emulated device is assigned; add --assign emul:MODEL`);
  }
  const pinned = behind.find((each) => each.policy === "pinned");
  if (pinned !== undefined) {
    throw new UsageError(
      `--emul-iommu ${text}: ${pinned.name} has the policy pinned, for which all of RAM is mapped; use dma=strict for it`,
    );
  }
  return {
    ...(entries === undefined ? {} : { entries }),
    ...(locked === undefined ? {} : { lockedBytesMax: locked }),
  };
}

function parseInjections(texts: readonly string[], assigned: readonly DeviceName[]): InjectSpec[] {
  if (texts.length > INJECTION_RULES_MAX) {
    throw new UsageError(`--inject: ${texts.length} rules, at most ${INJECTION_RULES_MAX} can be given`);
  }
  return texts.map((text) => {
    const spec = parseInjectSpec(text);
    if (spec.device !== undefined) handleOf(spec.device, assigned, `--inject ${text}`);
    return spec;
  });
}

/** To tell a running VMM something: the statistics directory it keeps, and the words. */
export interface Message {
  readonly directory: string;
  readonly line: string;
}

function parseMessage(directory: string, words: readonly string[]): Message {
  const line = words.join(" ").trim();
  if (line === "")
    throw new UsageError(`--tell ${directory}: tell it what? try: vmm --tell ${directory} help`);
  if (line.includes("\n")) throw new UsageError(`--tell ${directory}: a command is one line`);
  return { directory, line };
}

/** What the command line asks for: to run a guest, to tell one something, or to print something and end. */
export type Command =
  | { readonly run: Options }
  | { readonly tell: Message }
  | { readonly print: "help" | "version" };

/** Parses the arguments after the program's name; throws a UsageError of one line. */
export function parseCommandLine(args: readonly string[]): Command {
  let parsed: ReturnType<typeof parse>;
  try {
    parsed = parse(args);
  } catch (error) {
    // Node's messages are a sentence about the option, sometimes followed by advice about "--".
    throw new UsageError(`${(error as Error).message.split(". ")[0]}; see --help`);
  }
  const { values, positionals, tokens } = parsed;
  if (values.help) return { print: "help" };
  if (values.version) return { print: "version" };
  if (values.tell !== undefined) {
    const other = tokens.find((token) => token.kind === "option" && token.name !== "tell");
    if (other?.kind === "option")
      throw new UsageError(`${other.rawName}: does not go with --tell; see --help`);
    return { tell: parseMessage(values.tell, positionals) };
  }
  if (positionals.length > 1) {
    throw new UsageError(
      `${positionals[1]}: only one image can be given, and ${positionals[0]} already is; see --help`,
    );
  }
  const image = positionals[0];
  if (image === undefined && values.kernel === undefined) {
    throw new UsageError("nothing to run; give an image or --kernel, see --help");
  }
  const dma = checked(policy.optional(), "--dma", values.dma, values.dma ?? "");
  const memoryBytes = checked(memory, "--memory", values.memory, values.memory);
  const assignments: ParsedAssignment[] = [];
  for (const text of values.assign) assignments.push(parseAssignment(text, dma, assignments));
  const hugePages = checked(
    hugePagesKind.optional(),
    "--hugepages",
    values.hugepages,
    values.hugepages ?? "",
  );
  if (hugePages === "hugetlb" && memoryBytes % HUGE_PAGE_BYTES !== 0)
    throw new UsageError(`--memory ${values.memory}: not a multiple of 2M, as --hugepages hugetlb needs`);
  const granuleText = values["dma-granule"] ?? (hugePages ? "2M" : DEFAULT_GRANULE);
  const granuleBytes = checked(granule, "--dma-granule", granuleText, granuleText);
  const limits = parseDmaLimits(values["dma-limit"], assignments, memoryBytes, granuleBytes);
  return {
    run: {
      ...(image === undefined ? {} : { image }),
      ...(values.kernel === undefined ? {} : { kernel: values.kernel }),
      ...(values.initrd === undefined ? {} : { initrd: values.initrd }),
      ...(values.cmdline === undefined ? {} : { cmdline: values.cmdline }),
      ...(values["stats-dir"] === undefined ? {} : { statsDir: values["stats-dir"] }),
      cpus: checked(wholeNumber(1, CPUS_MAX), "--cpus", values.cpus, values.cpus),
      memoryBytes,
      assignments: assignments.map((each, i) => ({ ...each, limitBytes: limits.get(i) ?? 0 })),
      limitBytes: limits.get(-1) ?? 0,
      granuleBytes,
      ...(hugePages && { hugePages }),
      idleSeconds: checked(wholeNumber(0, 86400), "--dma-idle", values["dma-idle"], values["dma-idle"]),
      softIommu: parseSoftIommu(values["emul-iommu"], assignments),
      injections: parseInjections(
        values.inject,
        assignments.map(({ name }) => name),
      ),
      stats: values.stats,
      reboot: !values["no-reboot"],
    },
  };
}

const parse = (args: readonly string[]) =>
  parseArgs({
    args: [...args],
    allowPositionals: true,
    tokens: true,
    options: {
      assign: { type: "string", multiple: true, default: [] },
      dma: { type: "string" },
      "dma-limit": { type: "string", multiple: true, default: [] },
      "dma-granule": { type: "string" },
      hugepages: { type: "string" },
      "dma-idle": { type: "string", default: DEFAULT_IDLE },
      "emul-iommu": { type: "string", multiple: true, default: [] },
      inject: { type: "string", multiple: true, default: [] },
      tell: { type: "string" },
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
