// Runs in L1: starts what the outside asks for over the virtio-serial port and reports what comes of it.
// usage: node agent.js /dev/vportNpM. Speaks wire.ts.

import { open } from "node:fs/promises";
import { StringDecoder } from "node:string_decoder";
import { setTimeout as sleep } from "node:timers/promises";
import { type LocalProcess, startLocal } from "./local.js";
import { LineReader, type Report, type Request } from "./wire.js";

const port = await open(process.argv[2]!, "r+");
const processes = new Map<number, LocalProcess>();

// Output waits here for the port. Above the first mark the processes are held back, below the second they go on.
const holdBackBytes = 4 << 20;
const goOnBytes = 1 << 20;
let queue: Buffer[] = [];
let queuedBytes = 0;
let heldBack = false;
let writing = false;

function report(message: Report): void {
  const line = Buffer.from(`${JSON.stringify(message)}\n`);
  queue.push(line);
  queuedBytes += line.length;
  if (queuedBytes > holdBackBytes) holdBack(true);
  if (!writing) void drain();
}

async function drain(): Promise<void> {
  writing = true;
  while (queue.length > 0) {
    const batch = Buffer.concat(queue);
    queue = [];
    for (let done = 0; done < batch.length; ) {
      done += (await port.write(batch, done)).bytesWritten; // the driver takes 32 KiB at a time
    }
    queuedBytes -= batch.length;
    if (queuedBytes < goOnBytes) holdBack(false);
  }
  writing = false;
}

function holdBack(hold: boolean): void {
  if (hold === heldBack) return;
  heldBack = hold;
  for (const child of processes.values()) child.pause(hold);
}

async function serve(request: Request): Promise<void> {
  const { id } = request;
  if (request.op === "spawn") {
    const { command, env, cwd, pty } = request;
    try {
      const child = await startLocal(command, {
        ...(env && { env }),
        ...(cwd !== undefined && { cwd }),
        ...(pty && { pty }),
        onOutput: (bytes, stream) => report({ event: "output", id, stream, data: bytes.toString("base64") }),
      });
      processes.set(id, child);
      report({ event: "started", id, pid: child.pid });
      void child.exited.then((status) => {
        processes.delete(id);
        report({ event: "exit", id, status });
      });
    } catch (error) {
      report({ event: "failed", id, message: (error as Error).message });
    }
    return;
  }
  const child = processes.get(id);
  if (child === undefined) return; // it has just ended; the exit report is on its way
  if (request.op === "stdin") child.write(Buffer.from(request.data, "base64"));
  else if (request.op === "end") child.end();
  else child.kill(request.signal);
}

report({ event: "ready" });
const lines = new LineReader<Request>();
const decoder = new StringDecoder("utf8");
const chunk = Buffer.alloc(64 << 10);
for (;;) {
  const { bytesRead } = await port.read(chunk, 0, chunk.length);
  if (bytesRead === 0) await sleep(50); // nobody holds the other end (any more)
  for (const request of lines.read(decoder.write(chunk.subarray(0, bytesRead)))) await serve(request);
}
