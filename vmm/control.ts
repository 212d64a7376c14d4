// The control socket of a running VMM, and its client. A line of text asks; lines answer, the last of them `ok …` or
// `error: …`. Main thread. Whoever can open the socket is this user, but may be a broken program: nothing that comes
// in, or is not read, ends the VMM, holds up its main thread for long, or takes much memory.

import { closeSync, constants, lstatSync, openSync, unlinkSync } from "node:fs";
import { connect, createServer, type Server, type Socket } from "node:net";
import { join } from "node:path";
import { INJECTION_RULES_MAX, type Injector } from "../hypercalls/injection.js";
import type { DeviceName } from "./device-name.js";
import { errorMessage, isExpected, VmmError } from "./errors.js";
import { parseInjectSpec, ruleOf, ruleText } from "./inject-spec.js";

/** The socket's name in the statistics directory. */
const SOCKET_NAME = "control";
/** Longest request, without its newline. */
const LINE_BYTES_MAX = 4096;
/** With one more, the oldest connection is closed: who forgot to close some can still get in. */
const CONNECTIONS_MAX = 8;
/** Requests of one connection that are answered before the main thread looks at anything else. */
const LINES_PER_TURN = 32;
/** How long a connection that is given up stays to have its answer read. */
const LINGER_MS = 1000;
/** How long the client waits: at its start, a VMM may be busy opening devices. */
const ANSWER_TIMEOUT_MS = 30_000;

/** What requests are about. */
export interface Controlled {
  readonly injector: Pick<Injector, "add" | "remove" | "clear" | "list">;
  /** In the order of their handles. */
  readonly assigned: readonly DeviceName[];
}

interface ControlCommand {
  readonly usage: string;
  readonly about: string;
  /** Lines of the answer; the last is what follows `ok`. Throws a UsageError. */
  run(argument: string, controlled: Controlled): readonly string[];
}

const COMMANDS: Readonly<Record<string, ControlCommand>> = {
  inject: {
    usage: "inject [CALL[,KEY=VALUE…]]",
    about: "adds a rule as --inject does; without one, lists the rules",
    run: (text, controlled) => (text === "" ? listRules(controlled) : [addRule(text, controlled)]),
  },
  uninject: {
    usage: "uninject N|all",
    about: "removes rule N, or all rules",
    run: (text, controlled) => [removeRules(text, controlled)],
  },
  help: {
    usage: "help",
    about: "lists the commands",
    run: () => [...Object.values(COMMANDS).map(({ usage, about }) => `${usage.padEnd(30)}${about}`), ""],
  },
};

function addRule(text: string, { injector, assigned }: Controlled): string {
  const rule = ruleOf(parseInjectSpec(text, "inject"), assigned, `inject ${text}`);
  const id = injector.add(rule);
  if (id === 0)
    throw new VmmError(
      `inject ${text}: there are ${INJECTION_RULES_MAX} rules already; remove one (uninject N)`,
    );
  return `rule ${id}`;
}

function listRules({ injector, assigned }: Controlled): string[] {
  const rules = injector.list();
  const lines = rules.map(
    ({ id, rule, matched, struck }) =>
      `rule ${id}: ${ruleText(rule, assigned)} (matched ${matched}, struck ${struck})`,
  );
  return [...lines, `${rules.length} rules`];
}

function removeRules(text: string, { injector }: Controlled): string {
  if (text === "all") {
    const { length } = injector.list();
    injector.clear();
    return `${length} rules removed`;
  }
  if (!/^\d{1,3}$/.test(text) || !injector.remove(Number(text))) {
    throw new VmmError(`uninject ${text}: no such rule; give a number that inject lists, or all`);
  }
  return `rule ${Number(text)} removed`;
}

/** The answer to one request, whatever it holds: lines, each with its newline. Never throws. */
export function answer(line: string, controlled: Controlled): string {
  try {
    if (/[\p{Cc}\ufffd]/u.test(line)) throw new VmmError("a request is plain text in UTF-8");
    const [, name = "", argument = ""] = /^(\S*)\s*(.*)$/u.exec(line.trim()) ?? [];
    const command = Object.hasOwn(COMMANDS, name) ? COMMANDS[name] : undefined;
    if (command === undefined)
      throw new VmmError(`${name === "" ? "empty" : name}: no such command; try help`);
    const lines = command.run(argument, controlled);
    const status = `ok ${lines.at(-1)}`.trimEnd();
    return [...lines.slice(0, -1), status].map((each) => `${each}\n`).join("");
  } catch (error) {
    return `error: ${isExpected(error) ? "" : "internal error: "}${errorMessage(error)}\n`;
  }
}

/**
 * A directory and the path of its socket by way of /proc: no longer than a socket's address may be (107 bytes),
 * however long the directory's own path is. Valid until closeSync(fd). Throws Node's error.
 */
function socketIn(directory: string): { fd: number; path: string } {
  const fd = openSync(directory, constants.O_RDONLY | constants.O_DIRECTORY);
  return { fd, path: `/proc/self/fd/${fd}/${SOCKET_NAME}` };
}

/** The socket that a running VMM listens on. */
export class ControlSocket {
  private readonly connections = new Set<Socket>();

  private constructor(
    private readonly server: Server,
    private readonly directoryFd: number,
    respond: (line: string) => string,
  ) {
    server.on("connection", (socket) => this.accept(socket, respond));
    // No file number left for a connection, say: the client sees it closed.
    server.on("error", () => undefined);
    server.unref();
  }

  /**
   * Listens in `directory`, for this user only; `respond` gives a request's answer. What a killed VMM left there is
   * replaced. Rejects with a VmmError where a socket cannot be.
   */
  static async open(directory: string, respond: (line: string) => string): Promise<ControlSocket> {
    const about = `control socket ${join(directory, SOCKET_NAME)}`;
    let fd: number | undefined;
    try {
      const socket = socketIn(directory);
      fd = socket.fd;
      const there = lstatSync(socket.path, { throwIfNoEntry: false });
      if (there?.isSocket() === false)
        throw new VmmError(`${about}: something else has this name; remove it`);
      if (await isListenedOn(socket.path)) throw new VmmError(`${about}: another VMM listens on it`);
      if (there !== undefined) unlinkSync(socket.path);
      const server = createServer({ allowHalfOpen: true });
      await listen(server, socket.path);
      return new ControlSocket(server, fd, respond);
    } catch (error) {
      if (fd !== undefined) closeSync(fd);
      if (isExpected(error)) throw error;
      throw new VmmError(`${about}: cannot be made (${(error as NodeJS.ErrnoException).code})`);
    }
  }

  /** Closes every connection and removes the socket. */
  close(): void {
    for (const socket of this.connections) socket.destroy();
    // Removes the file too, for which the directory still has to be open.
    this.server.close();
    closeSync(this.directoryFd);
  }

  private accept(socket: Socket, respond: (line: string) => string): void {
    for (const oldest of this.connections) {
      if (this.connections.size < CONNECTIONS_MAX) break;
      this.connections.delete(oldest);
      oldest.destroy();
    }
    this.connections.add(socket);
    socket.unref();
    socket.on("close", () => this.connections.delete(socket));
    serve(socket, respond);
  }
}

/** Whether somebody listens on a socket, or may: only a refusal says that nobody does. */
function isListenedOn(path: string): Promise<boolean> {
  return new Promise((resolve) => {
    const socket = connect(path, () => {
      socket.destroy();
      resolve(true);
    });
    socket.on("error", ({ code }: NodeJS.ErrnoException) =>
      resolve(code !== "ECONNREFUSED" && code !== "ENOENT"),
    );
  });
}

/** Whether a VMM uses `directory` for its figures at this moment. */
export async function isInUse(directory: string): Promise<boolean> {
  let fd: number;
  let path: string;
  try {
    ({ fd, path } = socketIn(directory));
  } catch {
    return false; // not there yet, or whoever wants to use it will say why it cannot be
  }
  try {
    return await isListenedOn(path);
  } finally {
    closeSync(fd);
  }
}

async function listen(server: Server, path: string): Promise<void> {
  // The file gets its mode from the umask when it is made, which is before listen() returns.
  const umask = process.umask(0o177);
  const listening = new Promise<void>((resolve, reject) => {
    server.once("error", reject).listen(path, () => {
      server.off("error", reject);
      resolve();
    });
  });
  process.umask(umask);
  await listening;
}

/** Answers the lines of one connection in order, and no faster than they are read. */
function serve(socket: Socket, respond: (line: string) => string): void {
  const decoder = new TextDecoder();
  let unread = Buffer.alloc(0);
  /** Answers wait to be read, or other work goes first. */
  let held = false;
  let ended = false;

  const proceed = (): void => {
    if (held || socket.destroyed) return;
    let reply = "";
    let lines = 0;
    let end = unread.indexOf("\n");
    for (; end >= 0 && end <= LINE_BYTES_MAX && lines < LINES_PER_TURN; end = unread.indexOf("\n")) {
      reply += respond(decoder.decode(unread.subarray(0, end)));
      unread = unread.subarray(end + 1);
      lines++;
    }
    const tooLong = end > LINE_BYTES_MAX || (end < 0 && unread.length > LINE_BYTES_MAX);
    if (tooLong) {
      // Where the next request begins is anybody's guess. What still comes is read and dropped for a while: a client
      // that finds itself cut off while it writes would not see the answer.
      socket.end(`${reply}error: a request has at most ${LINE_BYTES_MAX} bytes\n`);
      socket.removeAllListeners("data").resume();
      held = true;
      setTimeout(() => socket.destroy(), LINGER_MS).unref();
      return;
    }
    const goOn = () => {
      held = false;
      socket.resume();
      proceed();
    };
    if (reply !== "" && !socket.write(reply)) {
      held = true;
      socket.once("drain", goOn);
    } else if (end >= 0) {
      held = true;
      setImmediate(goOn);
    }
    if (held) socket.pause();
    // A line that was not finished is not a request: `uninject 1` may have been `uninject 12`.
    else if (ended) socket.end();
  };

  socket.on("data", (chunk: Buffer) => {
    unread = Buffer.concat([unread, chunk]);
    proceed();
  });
  socket.on("end", () => {
    ended = true;
    proceed();
  });
  // It went away without waiting for its answer.
  socket.on("error", () => socket.destroy());
}

const NOBODY: Readonly<Record<string, string>> = {
  ENOENT: "no such directory, or no VMM runs with it",
  ENOTDIR: "not a directory",
  ECONNREFUSED: "its VMM is gone",
  EACCES: "no permission; be the user that runs the VMM",
};

/**
 * Sends one request to the VMM whose statistics directory this is, and resolves to the lines of its answer. Rejects
 * with a VmmError when the answer is an error, and when there is none.
 */
export async function tell(directory: string, line: string): Promise<string> {
  let reply: Reply;
  let fd: number | undefined;
  try {
    const socket = socketIn(directory);
    fd = socket.fd;
    reply = await ask(socket.path, line);
  } catch (error) {
    const { code = "", message } = error as NodeJS.ErrnoException;
    const why = NOBODY[code] === undefined ? message : `${NOBODY[code]} (${code})`;
    const advice =
      "give the statistics directory of a VMM that runs: its --stats-dir, or pvdma/PID in $XDG_RUNTIME_DIR or /run";
    throw new VmmError(`--tell ${directory}: ${why}; ${advice}`);
  } finally {
    if (fd !== undefined) closeSync(fd);
  }
  const [, error] = /^error: (.*)$/.exec(reply.status) ?? [];
  if (error !== undefined) throw new VmmError(error);
  return `${reply.before}${reply.status}\n`;
}

interface Reply {
  /** Lines before the last one. */
  readonly before: string;
  /** The last line, without its newline. */
  readonly status: string;
}

function ask(path: string, line: string): Promise<Reply> {
  return new Promise((resolve, reject) => {
    let text = "";
    const socket = connect(path, () => socket.write(`${line}\n`));
    socket.setEncoding("utf8").setTimeout(ANSWER_TIMEOUT_MS);
    socket.on("data", (chunk: string) => {
      text += chunk;
      const end = /^(ok\b.*|error: .*)\n/m.exec(text);
      if (end === null) return;
      resolve({ before: text.slice(0, end.index), status: end[1]! });
      socket.destroy();
    });
    socket.on("timeout", () => socket.destroy(new Error(`no answer within ${ANSWER_TIMEOUT_MS / 1000} s`)));
    socket.on("error", reject);
    socket.on("close", () => reject(new Error("its VMM ended without an answer")));
  });
}
