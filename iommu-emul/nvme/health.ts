// What the controller counts, and its error log: the SMART page (5.14.1.2) and the error information page (5.14.1.1).
// Since the machine started; nothing of it is kept in the file.

import type { Command } from "./command.js";
import { ERROR_LOG_ENTRIES, TEMPERATURE } from "./spec.js";

const ENTRY_BYTES = 64;
const SMART_BYTES = 512;
/** A data unit is 1000 × 512 bytes, rounded up. */
const UNIT_BYTES = 512_000;
/** Bit of the critical warning. */
export const WARNING = { temperature: 1 << 1 } as const;

export class Health {
  /** Fetched, of all queues; not in a log page. */
  commands = 0;
  bytesRead = 0;
  bytesWritten = 0;
  readCommands = 0;
  writeCommands = 0;
  busyMs = 0;
  mediaErrors = 0;
  errors = 0;
  unsafeShutdowns = 0;
  readonly #started = performance.now();
  readonly #log = Buffer.alloc(ERROR_LOG_ENTRIES * ENTRY_BYTES);

  /** A command failed; `status` is the status field without the phase. */
  failed(command: Command, status: number): void {
    const at = this.#next();
    const log = this.#log;
    log.writeUInt16LE(command.queue?.id ?? 0, at + 8);
    log.writeUInt16LE(command.id, at + 10);
    log.writeUInt16LE((status << 1) & 0xffff, at + 12);
    // No parameter is blamed: FFFFh.
    log.writeUInt16LE(0xffff, at + 14);
    if ((command.queue?.id ?? 0) !== 0) {
      log.writeUInt32LE(command.words[10]!, at + 16);
      log.writeUInt32LE(command.words[11]!, at + 20);
    }
    log.writeUInt32LE(command.namespace, at + 24);
  }

  /** Something failed that is no command's: a doorbell, a queue. */
  failedAlone(status: number): void {
    const at = this.#next();
    this.#log.writeUInt16LE(0xffff, at + 8);
    this.#log.writeUInt16LE(0xffff, at + 10);
    this.#log.writeUInt16LE((status << 1) & 0xffff, at + 12);
    this.#log.writeUInt16LE(0xffff, at + 14);
  }

  #next(): number {
    const at = (this.errors % ERROR_LOG_ENTRIES) * ENTRY_BYTES;
    this.errors++;
    this.#log.fill(0, at, at + ENTRY_BYTES);
    // Counts from 1; an entry with 0 is empty.
    this.#log.writeUInt32LE(this.errors % 2 ** 32, at);
    this.#log.writeUInt32LE(Math.floor(this.errors / 2 ** 32), at + 4);
    return at;
  }

  /** The newest entry first. */
  errorPage(): Buffer {
    const page = Buffer.alloc(ERROR_LOG_ENTRIES * ENTRY_BYTES);
    for (let i = 0; i < Math.min(this.errors, ERROR_LOG_ENTRIES); i++) {
      const from = ((this.errors - 1 - i) % ERROR_LOG_ENTRIES) * ENTRY_BYTES;
      this.#log.copy(page, i * ENTRY_BYTES, from, from + ENTRY_BYTES);
    }
    return page;
  }

  smartPage(warning: number): Buffer {
    const page = Buffer.alloc(SMART_BYTES);
    const count = (offset: number, value: number) => {
      page.writeUInt32LE(value % 2 ** 32, offset);
      page.writeUInt32LE(Math.floor(value / 2 ** 32), offset + 4);
    };
    page[0] = warning;
    page.writeUInt16LE(TEMPERATURE.composite, 1);
    page[3] = 100;
    page[4] = 10;
    count(32, Math.ceil(this.bytesRead / UNIT_BYTES));
    count(48, Math.ceil(this.bytesWritten / UNIT_BYTES));
    count(64, this.readCommands);
    count(80, this.writeCommands);
    count(96, Math.floor(this.busyMs / 60_000));
    count(112, 1);
    count(128, Math.floor((performance.now() - this.#started) / 3_600_000));
    count(144, this.unsafeShutdowns);
    count(160, this.mediaErrors);
    count(176, this.errors);
    return page;
  }
}
