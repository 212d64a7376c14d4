// The control socket: what it answers, who may connect, and that no client, however broken, ends or stalls it. Real
// sockets in a directory of their own, real rules of the engine.

import { existsSync, mkdirSync, mkdtempSync, renameSync, rmSync, statSync, writeFileSync } from "node:fs";
import { connect, createServer, type Socket } from "node:net";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { setTimeout as sleep } from "node:timers/promises";
import { suite } from "uvu";
import * as assert from "uvu/assert";
import { createInjection, INJECTION_RULES_MAX, Injector } from "../../hypercalls/injection.js";
import { answer, type Controlled, ControlSocket, isInUse, tell } from "../../vmm/control.js";
import { VmmError } from "../../vmm/errors.js";
import { parseBdf } from "../../vmm/vfio/sysfs.js";

interface Context {
  directory: string;
  controlled: Controlled;
  socket: ControlSocket;
  clients: Socket[];
}
const test = suite<Context>("control socket");

test.before.each(async (context) => {
  context.directory = mkdtempSync(join(tmpdir(), "pvdma-control-"));
  const injector = new Injector(createInjection());
  context.controlled = { injector, assigned: [parseBdf("0000:02:00.0")] };
  context.socket = await ControlSocket.open(context.directory, (line) => answer(line, context.controlled));
  context.clients = [];
});
test.after.each((context) => {
  for (const client of context.clients) client.destroy();
  context.socket.close();
  rmSync(context.directory, { recursive: true });
});

/** Everything that comes back for these bytes until the socket is closed or `lines` lines are there. */
function exchange(context: Context, bytes: string | Buffer, lines: number): Promise<string> {
  return new Promise((resolve, reject) => {
    const client = connect(join(context.directory, "control"));
    context.clients.push(client);
    let text = "";
    client.setEncoding("utf8");
    client.on("data", (chunk: string) => {
      text += chunk;
      if (text.split("\n").length > lines) resolve(text);
    });
    client.on("close", () => resolve(text));
    client.on("error", reject);
    client.write(bytes);
  });
}

const error = async (promise: Promise<unknown>): Promise<string> => {
  try {
    await promise;
  } catch (thrown) {
    assert.instance(thrown, VmmError);
    return (thrown as Error).message;
  }
  return assert.unreachable("no error") as never;
};

test("rules are added, listed with their counts, and removed", async ({ directory, controlled }) => {
  assert.is(await tell(directory, "inject"), "ok 0 rules\n");
  assert.is(await tell(directory, "inject map,device=02:00.0,next=2"), "ok rule 1\n");
  assert.is(await tell(directory, "inject unmap,p=0.5,errno=EAGAIN"), "ok rule 2\n");
  for (let call = 0; call < 3; call++) (controlled.injector as Injector).decide(1, 1, 4096);
  assert.is(
    await tell(directory, "inject"),
    "rule 1: map,device=0000:02:00.0,next=2,errno=ENOSPC (matched 2, struck 2)\n" +
      "rule 2: unmap,p=0.5,seed=1,errno=EAGAIN (matched 0, struck 0)\nok 2 rules\n",
  );
  assert.is(await tell(directory, "uninject 1"), "ok rule 1 removed\n");
  assert.is(await tell(directory, "uninject all"), "ok 1 rules removed\n");
  assert.match(await tell(directory, "help"), /^inject \[CALL.*\nuninject N\|all.*\nhelp .*\nok\n$/);
});

test("what cannot be is one line that says why", async ({ directory }) => {
  assert.is(
    await error(tell(directory, "inject mop")),
    "inject mop: mop is no call that can fail; there are map, unmap and is-assigned",
  );
  assert.is(
    await error(tell(directory, "inject map,device=04:00.0")),
    "inject map,device=04:00.0: 0000:04:00.0 is not assigned; assigned: 0000:02:00.0",
  );
  assert.is(
    await error(tell(directory, "uninject 3")),
    "uninject 3: no such rule; give a number that inject lists, or all",
  );
  assert.is(await error(tell(directory, "reboot")), "reboot: no such command; try help");
  assert.is(await error(tell(directory, "constructor")), "constructor: no such command; try help");
  for (let rule = 0; rule < INJECTION_RULES_MAX; rule++) await tell(directory, "inject map");
  assert.is(
    await error(tell(directory, "inject map")),
    "inject map: there are 16 rules already; remove one (uninject N)",
  );
});

test("nobody there is said, with what to do", async ({ directory }) => {
  const advice =
    "give the statistics directory of a VMM that runs: its --stats-dir, or pvdma/PID in $XDG_RUNTIME_DIR or /run";
  const none = join(directory, "none");
  assert.is(
    await error(tell(none, "help")),
    `--tell ${none}: no such directory, or no VMM runs with it (ENOENT); ${advice}`,
  );
  mkdirSync(none);
  assert.is(
    await error(tell(none, "help")),
    `--tell ${none}: no such directory, or no VMM runs with it (ENOENT); ${advice}`,
  );
});

test("only this user may connect, and the end removes it", async (context) => {
  const path = join(context.directory, "control");
  assert.is(statSync(path).mode & 0o777, 0o600);
  assert.is(await isInUse(context.directory), true);
  context.socket.close();
  for (let wait = 0; existsSync(path) && wait < 100; wait++) await sleep(10);
  assert.not(existsSync(path));
  assert.is(await isInUse(context.directory), false);
  context.socket = await ControlSocket.open(context.directory, (line) => answer(line, context.controlled));
});

test("a directory whose path is longer than a socket's address can be", async (context) => {
  const deep = join(context.directory, ...Array.from({ length: 30 }, (_, i) => `directory-${i}`));
  mkdirSync(deep, { recursive: true });
  const socket = await ControlSocket.open(deep, (line) => answer(line, context.controlled));
  assert.is(await tell(deep, "inject"), "ok 0 rules\n");
  socket.close();
});

test("what a killed VMM left is replaced; a live one's and other files are not", async (context) => {
  const respond = (line: string) => answer(line, context.controlled);
  const path = join(context.directory, "control");
  assert.is(
    await error(ControlSocket.open(context.directory, respond)),
    `control socket ${path}: another VMM listens on it`,
  );

  const stale = join(context.directory, "stale");
  mkdirSync(stale);
  const server = createServer();
  await new Promise<void>((resolve) => server.listen(join(stale, "bound"), resolve));
  // A listener's file outlives its process when nobody unlinks it: rename keeps it from being found at close.
  renameSync(join(stale, "bound"), join(stale, "control"));
  await new Promise((resolve) => server.close(resolve));
  assert.ok(existsSync(join(stale, "control")));
  const socket = await ControlSocket.open(stale, respond);
  assert.is(await tell(stale, "inject"), "ok 0 rules\n");
  socket.close();

  const taken = join(context.directory, "taken");
  mkdirSync(taken);
  writeFileSync(join(taken, "control"), "precious");
  assert.is(
    await error(ControlSocket.open(taken, respond)),
    `control socket ${join(taken, "control")}: something else has this name; remove it`,
  );
  assert.is(statSync(join(taken, "control")).size, 8);
});

test("lines in pieces, many at once, and one that is never finished", async (context) => {
  const many = "inject\n".repeat(1000);
  const text = await exchange(context, many, 1000);
  assert.is(text, "ok 0 rules\n".repeat(1000));

  const client = connect(join(context.directory, "control"));
  context.clients.push(client);
  let got = "";
  client.on("data", (chunk: Buffer) => {
    got += chunk.toString();
  });
  for (const piece of ["inj", "ect ma", "p,next=", "5\nuninject 1"]) {
    client.write(piece);
    await sleep(20);
  }
  client.end();
  await new Promise((resolve) => client.on("close", resolve));
  assert.is(got, "ok rule 1\n");
  assert.is(context.controlled.injector.list().length, 1, "a line without an end is no request");
});

test("garbage gets an error and harms nobody", async (context) => {
  const text = await exchange(
    context,
    Buffer.from([0xff, 0xfe, 0x0a, 0x00, 0x0a, 0x1b, 0x5b, 0x0a, 0x0a]),
    4,
  );
  assert.is(
    text,
    `${"error: a request is plain text in UTF-8\n".repeat(3)}error: empty: no such command; try help\n`,
  );
  const long = await exchange(context, "x".repeat(5000), 1);
  assert.is(long, "error: a request has at most 4096 bytes\n");
  const longLine = await exchange(context, `inject\n${"y".repeat(1 << 20)}\ninject\n`, 99);
  assert.is(longLine, "ok 0 rules\nerror: a request has at most 4096 bytes\n");
  assert.is(await tell(context.directory, "inject"), "ok 0 rules\n");
});

test("a client that never reads holds up nobody and takes no memory", async (context) => {
  const client = connect(join(context.directory, "control"));
  context.clients.push(client);
  client.pause();
  client.on("error", () => undefined);
  let unsent = 0;
  const request = "help\n".repeat(1000);
  for (let i = 0; i < 4000 && unsent < 64; i++) {
    if (!client.write(request)) unsent++;
    if (i % 50 === 0) assert.is(await tell(context.directory, "inject"), "ok 0 rules\n");
    await sleep(0);
  }
  assert.ok(client.writableLength > 0, "the server has stopped to read it");
});

test("many clients: the oldest goes, new ones get in", async (context) => {
  const idle = Array.from({ length: 20 }, () => {
    const client = connect(join(context.directory, "control"));
    client.on("error", () => undefined);
    context.clients.push(client);
    return client;
  });
  await sleep(100);
  assert.is(await tell(context.directory, "inject"), "ok 0 rules\n");
  await sleep(50);
  const open = idle.filter((client) => !client.destroyed && client.readable);
  assert.ok(open.length <= 8, `${open.length} connections are open`);
});

test.run();
