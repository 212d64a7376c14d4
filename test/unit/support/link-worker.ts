// Threads at a link: a device with 16 registers that remember what is written, and writers that use one each.

import { parentPort, workerData } from "node:worker_threads";
import {
  COMMAND_CLOSE,
  COMMAND_RESET,
  LinkDevice,
  type LinkState,
  RegisterPort,
} from "../../../vmm/emul/link.js";

export type LinkJob =
  /** `aside`: sleeps beside an operation that never ends, as devices with files do. */
  | { readonly role: "device"; readonly link: LinkState; readonly aside: boolean }
  /** Writes 1 to `rounds` to register `cpu`, reads it back every few writes; says how often it was not right. */
  | {
      readonly role: "writer";
      readonly link: LinkState;
      readonly cpu: number;
      readonly rounds: number;
      readonly every: number;
    };

async function device(link: LinkState, aside: boolean): Promise<void> {
  const side = new LinkDevice(link);
  const registers = new Uint32Array(16);
  let writes = 0;
  let open = true;
  const server = {
    read: (bar: number, offset: number) => (bar === 5 ? writes : registers[offset / 4]!),
    write: (_bar: number, offset: number, _bytes: number, value: number) => {
      registers[offset / 4] = value;
      writes++;
    },
    command: (command: number) => {
      if (command === COMMAND_RESET) registers.fill(0);
      if (command === COMMAND_CLOSE) open = false;
    },
  };
  side.started();
  // What keeps a thread alive that has an operation under way.
  const operation = aside ? setInterval(() => undefined, 2 ** 30) : undefined;
  while (open) {
    const bell = side.bellCount;
    side.serve(server);
    if (!open) break;
    if (!aside) side.sleep(bell);
    else {
      await new Promise<void>((resolve) => {
        if (side.sleepAside(bell, resolve)) resolve();
      });
      side.awake();
    }
  }
  clearInterval(operation);
  side.end();
}

function write(job: LinkJob & { role: "writer" }): number {
  const stop = new Int32Array(new SharedArrayBuffer(4));
  const port = new RegisterPort(job.link, job.cpu, stop, 0);
  let wrong = 0;
  for (let round = 1; round <= job.rounds; round++) {
    port.write(0, job.cpu * 4, 4, round);
    if (round % job.every === 0 && port.read(0, job.cpu * 4, 4) !== round) wrong++;
  }
  if (port.read(0, job.cpu * 4, 4) !== job.rounds) wrong++;
  return wrong;
}

const job = workerData as LinkJob;
if (job.role === "device") await device(job.link, job.aside);
else parentPort!.postMessage(write(job));
