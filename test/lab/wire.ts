// What the outside (l1.ts) and the agent in L1 (agent.ts) say to each other: one JSON object per line over a
// virtio-serial port. Bytes travel as base64.

/** To the agent. `id` is chosen by the sender and names a process from its start to its end. */
export type Request =
  | {
      op: "spawn";
      id: number;
      command: string;
      env?: Record<string, string>;
      cwd?: string;
      pty?: { rows: number; columns: number };
    }
  | { op: "stdin"; id: number; data: string }
  | { op: "end"; id: number }
  | { op: "kill"; id: number; signal: NodeJS.Signals };

/** From the agent. The first is ready; a process has one started or failed, then outputs, then one exit. */
export type Report =
  | { event: "ready" }
  | { event: "started"; id: number; pid: number }
  | { event: "failed"; id: number; message: string }
  | { event: "output"; id: number; stream: "stdout" | "stderr"; data: string }
  | { event: "exit"; id: number; status: number };

/** The name of the virtio-serial port. */
export const portName = "pvdma.lab";

/** Cuts a stream of chunks into lines and parses each. */
export class LineReader<T> {
  #parts: string[] = [];

  *read(chunk: string): Generator<T> {
    let from = 0;
    for (;;) {
      const newline = chunk.indexOf("\n", from);
      if (newline < 0) break;
      this.#parts.push(chunk.slice(from, newline));
      const line = this.#parts.join("");
      this.#parts = [];
      from = newline + 1;
      if (line !== "") yield JSON.parse(line) as T;
    }
    if (from < chunk.length) this.#parts.push(chunk.slice(from));
  }
}
