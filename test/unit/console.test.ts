// The terminal behind COM1: what the guest writes is gathered and arrives, whatever ends the gathering; what is typed
// reaches the guest; Ctrl-A X leaves.

import { PassThrough, Writable } from "node:stream";
import { setTimeout as sleep } from "node:timers/promises";
import { suite } from "uvu";
import * as assert from "uvu/assert";
import { Console } from "../../vmm/devices/console.js";
import { newSerialState, Serial, TX_BYTES } from "../../vmm/devices/serial.js";

const THR = 0;
const LSR = 5;
const DATA_READY = 1;
/** What the UART holds for the guest. */
const RX_BYTES = 1 << 12;
const CTRL_A = "\x01";

/** A terminal that takes what comes, or one chunk and no more until it is told to. */
class Terminal extends Writable {
  readonly chunks: string[] = [];
  #done: (() => void) | undefined;

  constructor(private readonly stalls = false) {
    super({ highWaterMark: 1, decodeStrings: true });
  }

  override _write(chunk: Buffer, _encoding: string, done: () => void): void {
    this.chunks.push(chunk.toString("latin1"));
    if (this.stalls) this.#done = done;
    else done();
  }

  /** Takes what it was given last. */
  takeOne(): void {
    const done = this.#done;
    this.#done = undefined;
    done?.();
  }

  get text(): string {
    return this.chunks.join("");
  }
}

interface Setup {
  readonly terminal: Terminal;
  readonly input: PassThrough;
  readonly serial: Serial;
  readonly console: Console;
  /** How often it was left, and how often the serial port rang. */
  readonly counts: { left: number; rings: number };
  write(text: string): void;
}

function setUp(terminal = new Terminal()): Setup {
  const counts = { left: 0, rings: 0 };
  const input = new PassThrough();
  const console = new Console(input, terminal, () => counts.left++);
  // By a message, in the machine: the ring comes with the serial port's lock held.
  const ring = () => {
    counts.rings++;
    queueMicrotask(() => console.pump());
  };
  const serial = new Serial(newSerialState(), () => undefined, ring);
  console.attach(serial);
  const write = (text: string) => {
    for (const byte of Buffer.from(text, "latin1")) serial.write(THR, byte);
  };
  return { terminal, input, serial, console, counts, write };
}

/** Everything the guest can read at the moment. */
function read(serial: Serial): string {
  const bytes: number[] = [];
  while ((serial.read(LSR) & DATA_READY) !== 0) bytes.push(serial.read(THR));
  return Buffer.from(bytes).toString("latin1");
}

const test = suite("console");

test("what is written byte by byte arrives in one piece, after one ring", async () => {
  const { terminal, console, counts, write } = setUp();
  write("a line\r\n");
  assert.equal(terminal.chunks, [], "more may come");
  await sleep(50);
  assert.equal(terminal.chunks, ["a line\r\n"]);
  assert.is(counts.rings, 1);
  write("another");
  await sleep(50);
  assert.equal(terminal.chunks, ["a line\r\n", "another"]);
  console.detach();
});

test("what was written last arrives before detach() returns, and nothing is carried afterwards", async () => {
  const { terminal, console, write } = setUp();
  write("the end");
  console.detach();
  assert.is(terminal.text, "the end");
  write("behind it");
  await sleep(50);
  assert.is(terminal.text, "the end");
});

test("carry() does not wait: a full queue is carried, not dropped", () => {
  const { terminal, serial, console, write } = setUp();
  const text = "0123456789abcdef".repeat(TX_BYTES / 16);
  write(text);
  console.carry(); // as when the vCPUs are stopped
  serial.dropIfFull();
  assert.is(terminal.text, text);
  console.detach();
});

test("a terminal that is behind is given no more until it has taken that; then all comes in order", async () => {
  const { terminal, console, write } = setUp(new Terminal(true));
  write("one ");
  await sleep(50);
  write("two ");
  await sleep(50);
  write("three");
  await sleep(50);
  assert.equal(terminal.chunks, ["one "]);
  terminal.takeOne();
  await sleep(50);
  assert.equal(terminal.chunks, ["one ", "two three"]);
  terminal.takeOne();
  console.detach();
});

test("a terminal that is gone holds nobody up", async () => {
  const { terminal, serial, console, write } = setUp(new Terminal(true));
  write("lost");
  await sleep(50);
  write("x".repeat(TX_BYTES - 1));
  terminal.destroy();
  await sleep(50);
  write("y".repeat(TX_BYTES - 1)); // waits for ever if nobody takes what was there
  assert.is(serial.takeOutput().length, TX_BYTES - 1);
  console.detach();
});

test("typed bytes reach the guest at once, more than fit as it takes them", async () => {
  const { input, serial, console } = setUp();
  const text = "0123456789".repeat(RX_BYTES / 8);
  input.write(text);
  await sleep(0);
  let got = read(serial);
  assert.is(got.length, RX_BYTES);
  for (let tries = 0; tries < 10 && got.length < text.length; tries++) {
    await Promise.resolve(); // no timer has to run
    got += read(serial);
  }
  assert.is(got, text);
  console.detach();
});

test("Ctrl-A X leaves, Ctrl-A Ctrl-A is one Ctrl-A, another key after it is nothing", async () => {
  const { input, serial, console, counts } = setUp();
  input.write(`a${CTRL_A}${CTRL_A}b${CTRL_A}cd${CTRL_A}`);
  await sleep(0);
  assert.is(read(serial), `a${CTRL_A}bd`);
  assert.is(counts.left, 0);
  input.write("X");
  await sleep(0);
  assert.is(counts.left, 1);
  console.detach();
});

test.run();
