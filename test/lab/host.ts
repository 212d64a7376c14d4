// A machine with VFIO that tests run commands on: the virtual host L1 (l1.ts) or the machine itself (local.ts).
// Only the interface, what both kinds of process share, and the vfio-pci binding helpers are here.

import { StringDecoder } from "node:string_decoder";

export interface RunOptions {
  /** After this many milliseconds the command is killed and run() rejects. Default 120,000. */
  timeoutMs?: number;
  /** Written to the command's stdin, which is then closed. */
  stdin?: string;
  /** Added to the host's environment. */
  env?: Record<string, string>;
  /** Default: the root of the working tree. */
  cwd?: string;
}

export interface RunResult {
  /** Exit status; 128 + signal number when a signal ended it. */
  status: number;
  stdout: string;
  stderr: string;
}

export interface SpawnOptions {
  env?: Record<string, string>;
  cwd?: string;
  /** Give it a terminal of its own; stderr then comes as stdout. */
  pty?: { rows: number; columns: number };
  /** Called with output as it comes. */
  onOutput?: (bytes: Buffer, stream: "stdout" | "stderr") => void;
}

/** A command that runs in the host. */
export interface HostProcess {
  /** Of the shell that runs the command; begin the command with `exec` to have the program's own. */
  readonly pid: number;
  readonly stdout: string;
  readonly stderr: string;
  /** stdout and stderr in the order in which they came. */
  readonly output: string;
  /**
   * Resolves when `pattern` is in what came on a stream after the last match of waitFor() there; in `output` a line of
   * one stream can stand in the middle of the other's. Rejects, with the end of the output in the message, when the
   * process ends first or after `timeoutMs`.
   */
  waitFor(
    pattern: RegExp,
    timeoutMs: number,
    stream?: "stdout" | "stderr" | "output",
  ): Promise<RegExpExecArray>;
  /** Writes to its stdin. */
  write(data: string | Buffer): void;
  /** Closes its stdin. */
  end(): void;
  /** Signals the command and all that it started and did not put into a group of its own. Default SIGTERM. */
  kill(signal?: NodeJS.Signals): void;
  /** Exit status, 128 + signal number when a signal ended it. Rejects when the host dies. */
  readonly exited: Promise<number>;
}

export interface Host {
  readonly kind: "l1" | "local";
  /** Runs a shell command to its end. Rejects when it takes longer than its time-out or the host dies. */
  run(command: string, options?: RunOptions): Promise<RunResult>;
  /** Starts a shell command and leaves it running. */
  spawn(command: string, options?: SpawnOptions): Promise<HostProcess>;
  /** The kernel's log since the host's boot. */
  kernelLog(): Promise<string>;
  /** A directory that is the same, by the same path, inside and outside; both may write. */
  readonly shareDir: string;
  /** Ends every process started here and removes the host's files. Calling it again does nothing. */
  close(): Promise<void>;
}

export const defaultTimeoutMs = 120_000;

/** The bookkeeping of a HostProcess; who starts it overrides how it is written to and killed, and feeds it. */
export abstract class TrackedProcess implements HostProcess {
  abstract readonly pid: number;
  abstract write(data: string | Buffer): void;
  abstract end(): void;
  abstract kill(signal?: NodeJS.Signals): void;
  readonly exited: Promise<number>;

  readonly #text = { stdout: "", stderr: "", output: "" };
  readonly #decoders = { stdout: new StringDecoder("utf8"), stderr: new StringDecoder("utf8") };
  readonly #waiters = new Set<() => void>();
  readonly #command: string;
  readonly #onOutput: SpawnOptions["onOutput"];
  readonly #matchedUpTo = { stdout: 0, stderr: 0, output: 0 };
  #end: { status: number } | { error: Error } | undefined;
  #settle!: { resolve: (status: number) => void; reject: (error: Error) => void };

  constructor(command: string, onOutput: SpawnOptions["onOutput"]) {
    this.#command = command;
    this.#onOutput = onOutput;
    this.exited = new Promise((resolve, reject) => {
      this.#settle = { resolve, reject };
    });
    this.exited.catch(() => {}); // whoever waits for it sees the error; nobody need wait
  }

  get stdout(): string {
    return this.#text.stdout;
  }
  get stderr(): string {
    return this.#text.stderr;
  }
  get output(): string {
    return this.#text.output;
  }
  get ended(): boolean {
    return this.#end !== undefined;
  }

  feed(stream: "stdout" | "stderr", bytes: Buffer): void {
    const text = this.#decoders[stream].write(bytes);
    this.#text[stream] += text;
    this.#text.output += text;
    this.#onOutput?.(bytes, stream);
    for (const check of [...this.#waiters]) check();
  }

  /** The process ended by itself, or `error` says why nobody will ever know how it ends. */
  finish(end: { status: number } | { error: Error }): void {
    if (this.#end !== undefined) return;
    this.#end = end;
    if ("status" in end) this.#settle.resolve(end.status);
    else this.#settle.reject(end.error);
    for (const check of [...this.#waiters]) check();
  }

  waitFor(
    pattern: RegExp,
    timeoutMs: number,
    stream: "stdout" | "stderr" | "output" = "output",
  ): Promise<RegExpExecArray> {
    const once = new RegExp(pattern.source, pattern.flags.replace(/[gy]/g, ""));
    return new Promise((resolve, reject) => {
      const settle = (action: () => void): void => {
        clearTimeout(timer);
        this.#waiters.delete(check);
        action();
      };
      const fail = (why: string): void =>
        settle(() =>
          reject(new Error(`${why} before ${pattern} came: ${this.#command}\n${tail(this.output)}`)),
        );
      const check = (): void => {
        const match = once.exec(this.#text[stream].slice(this.#matchedUpTo[stream]));
        if (match !== null) {
          this.#matchedUpTo[stream] += match.index + match[0].length;
          settle(() => resolve(match));
        } else if (this.#end !== undefined) {
          if ("error" in this.#end) fail(this.#end.error.message);
          else fail(`exit status ${this.#end.status}`);
        }
      };
      const timer = setTimeout(() => fail(`${timeoutMs} ms passed`), timeoutMs);
      this.#waiters.add(check);
      check();
    });
  }
}

/** run() in terms of spawn(): the same for every kind of host. */
export async function runToEnd(
  host: Pick<Host, "spawn">,
  command: string,
  options: RunOptions = {},
): Promise<RunResult> {
  const { timeoutMs = defaultTimeoutMs, stdin, ...rest } = options;
  const child = await host.spawn(command, rest);
  if (stdin !== undefined && stdin !== "") child.write(stdin);
  child.end();
  let timer: NodeJS.Timeout | undefined;
  const late = new Promise<never>((_, reject) => {
    timer = setTimeout(() => {
      child.kill("SIGKILL");
      reject(new Error(`not done after ${timeoutMs} ms, killed: ${command}\n${tail(child.output)}`));
    }, timeoutMs);
  });
  try {
    const status = await Promise.race([child.exited, late]);
    return { status, stdout: child.stdout, stderr: child.stderr };
  } finally {
    clearTimeout(timer);
  }
}

/** The last lines of a text, for error messages. */
export function tail(text: string, lines = 25): string {
  return text.trimEnd().split("\n").slice(-lines).join("\n");
}

/** Quotes a word for sh. */
export function shellQuote(word: string): string {
  return /^[\w@%+=:,./-]+$/.test(word) ? word : `'${word.replaceAll("'", `'\\''`)}'`;
}

/** run() that takes any status but 0 for an error. Returns stdout. */
export async function must(host: Host, command: string, options?: RunOptions): Promise<string> {
  const { status, stdout, stderr } = await host.run(command, options);
  if (status !== 0) throw new Error(`exit status ${status}: ${command}\n${tail(stderr || stdout)}`);
  return stdout;
}

/** Address of a PCI function, "0000:02:00.0"; checked because it goes into shell commands. */
function checkBdf(bdf: string): string {
  if (!/^[0-9a-f]{4,8}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-7]$/.test(bdf))
    throw new Error(`${bdf}: not a PCI address (0000:02:00.0)`);
  return bdf;
}

/** The driver a PCI function is bound to, undefined if none. Throws if there is no such function. */
export async function pciDriver(host: Host, bdf: string): Promise<string | undefined> {
  const device = `/sys/bus/pci/devices/${checkBdf(bdf)}`;
  const { status, stdout } = await host.run(
    `[ -e ${device} ] || exit 9; [ ! -e ${device}/driver ] || basename "$(readlink ${device}/driver)"`,
  );
  if (status !== 0) throw new Error(`${bdf}: the host has no such PCI device`);
  const name = stdout.trim();
  return name === "" ? undefined : name;
}

/** The number of a PCI function's IOMMU group. Throws if it has none. */
export async function iommuGroup(host: Host, bdf: string): Promise<number> {
  return Number(
    await must(host, `basename "$(readlink -e /sys/bus/pci/devices/${checkBdf(bdf)}/iommu_group)"`),
  );
}

/**
 * Binds a PCI function to a driver, `vfio-pci` unless told otherwise, taking it from the one it has. A device that
 * is bound to that driver already is left as it is. Needs root in the host. Returns the driver it had before.
 */
export async function bindDriver(host: Host, bdf: string, driver = "vfio-pci"): Promise<string | undefined> {
  const before = await pciDriver(host, bdf);
  if (before === driver) return before;
  const device = `/sys/bus/pci/devices/${bdf}`;
  await must(
    host,
    `set -e
     modprobe ${shellQuote(driver)}
     echo ${shellQuote(driver)} > ${device}/driver_override
     if [ -e ${device}/driver ]; then echo ${bdf} > ${device}/driver/unbind; fi
     echo ${bdf} > /sys/bus/pci/drivers_probe`,
  );
  const now = await pciDriver(host, bdf);
  if (now !== driver)
    throw new Error(
      `${bdf}: did not bind to ${driver} (driver now: ${now ?? "none"}); see the host's kernel log`,
    );
  return before;
}

/** bindDriver(host, bdf, "vfio-pci"). */
export function bindVfio(host: Host, bdf: string): Promise<string | undefined> {
  return bindDriver(host, bdf, "vfio-pci");
}

/** Takes a PCI function from its driver and clears the override; no driver takes it until it is probed again. */
export async function unbindDriver(host: Host, bdf: string): Promise<void> {
  const device = `/sys/bus/pci/devices/${checkBdf(bdf)}`;
  await must(
    host,
    `set -e
     echo > ${device}/driver_override
     if [ -e ${device}/driver ]; then echo ${bdf} > ${device}/driver/unbind; fi`,
  );
}
