// The NVM command set (6). Everything is checked before data moves; data of a command is read from the guest once, and
// goes through the command's own buffer; what is read and cached goes to the guest at once. Blocks are the namespace's, offsets and lengths bytes of the file.

import { REFUSED } from "../device.js";
import { WOULD_WAIT } from "./backing-file.js";
import type { Command } from "./command.js";
import type { ControllerCore } from "./core.js";
import { IO, NSID, NSID_ALL, STATUS, TRANSFER_BYTES_MAX, u64 } from "./spec.js";

const FUSED_MASK = 0x300;
const FUA = 1 << 30;
/** Bits of word 12: deallocate (Write Zeroes), and the directive's type (Write), of which there is none. */
const DEALLOCATE = 1 << 25;
const DIRECTIVE_MASK = 0xf0_0000;
/** Dataset management: a range is context attributes, blocks, first block; word 11's bit 2 asks to deallocate. */
const RANGE_BYTES = 16;
const ATTRIBUTE_DEALLOCATE = 1 << 2;
/** What a file system without space says: ENOSPC, EDQUOT, EFBIG. */
const NO_SPACE = new Set([28, 122, 27]);

export class IoCommands {
  readonly #core: ControllerCore;
  readonly #blocks: number;
  /** The guest's side of a comparison. One for all: it is used up at once. */
  #compared: Buffer | undefined;
  /** Of the call of #readInto that is under way. */
  #reading: Command | undefined;

  constructor(core: ControllerCore) {
    this.#core = core;
    this.#blocks = Math.floor(core.disk.bytes / core.blockBytes);
  }

  /** A status, or PENDING; command.bytes are those that it moves. */
  run(command: Command): number {
    const opcode = command.opcode;
    command.bytes = 0;
    if (!KNOWN.has(opcode)) return STATUS.invalidOpcode;
    const status = this.#check(command, opcode);
    if (status !== STATUS.ok) return status;
    switch (opcode) {
      case IO.read:
        return this.#read(command);
      case IO.write:
        return this.#write(command);
      case IO.flush:
        return this.#store(command);
      case IO.compare:
        return this.#compare(command);
      case IO.verify:
        return this.#core.later(command, this.#verify(command), this.#verified);
      case IO.writeZeroes:
        return this.#writeZeroes(command);
      default:
        return this.#datasetManagement(command);
    }
  }

  /** Namespace, fuse, protection, range and size; sets the file range. */
  #check(command: Command, opcode: number): number {
    const { disk, blockBytes } = this.#core;
    const namespace = command.namespace;
    if (namespace !== NSID && !(namespace === NSID_ALL && opcode === IO.flush))
      return STATUS.invalidNamespace;
    if ((command.words[0]! & FUSED_MASK) !== 0) return STATUS.invalidField;
    if (opcode === IO.flush || opcode === IO.datasetManagement) return STATUS.ok;
    if (disk.readonly && (opcode === IO.write || opcode === IO.writeZeroes)) return STATUS.writeProtected;
    if (opcode === IO.write && (command.words[12]! & DIRECTIVE_MASK) !== 0) return STATUS.invalidField;
    const first = command.firstBlock;
    const blocks = (command.words[12]! & 0xffff) + 1;
    if (first + blocks > this.#blocks) return STATUS.lbaRange;
    command.fileOffset = first * blockBytes;
    command.bytes = blocks * blockBytes;
    // Write Zeroes and Verify move nothing.
    if (opcode === IO.writeZeroes || opcode === IO.verify) return STATUS.ok;
    return command.bytes > TRANSFER_BYTES_MAX ? STATUS.invalidField : STATUS.ok;
  }

  #read(command: Command): number {
    const core = this.#core;
    const status = core.transfer.resolve(command, command.bytes);
    if (status !== STATUS.ok) return status;
    const inPlace = core.disk.canReadInto ? this.#readInPlace(command) : REFUSED;
    if (inPlace === 0) return this.#wasRead(command);
    if (inPlace === REFUSED) {
      const errno = core.disk.readNow(command.data, command.bytes, command.fileOffset);
      if (errno !== WOULD_WAIT) return this.#afterRead(command, errno);
    }
    const operation = core.disk.readLater(command.data, command.bytes, command.fileOffset);
    return core.later(command, operation, this.#afterRead);
  }

  /** From the page cache to the guest in one copy: 0, WOULD_WAIT (and any of it is there), or REFUSED. */
  #readInPlace(command: Command): number {
    this.#reading = command;
    const { segmentIova, segmentBytes, segments } = command;
    return this.#core.dma.writeInPlace(segmentIova, segmentBytes, segments, this.#readInto);
  }

  readonly #readInto = (vectors: number, count: number): number => {
    const { bytes, fileOffset } = this.#reading!;
    return this.#core.disk.readNowInto(vectors, count, bytes, fileOffset);
  };

  readonly #afterRead = (command: Command, errno: number): number => {
    if (errno !== 0) return this.#mediaError(STATUS.readError);
    const status = this.#core.transfer.toGuest(command, command.data.bytes);
    return status === STATUS.ok ? this.#wasRead(command) : status;
  };

  #wasRead(command: Command): number {
    const { health } = this.#core;
    health.readCommands++;
    health.bytesRead += command.bytes;
    // With FUA what is returned is what is stored.
    return (command.words[12]! & FUA) !== 0 ? this.#store(command) : STATUS.ok;
  }

  #write(command: Command): number {
    const core = this.#core;
    let status = core.transfer.resolve(command, command.bytes);
    if (status === STATUS.ok) status = core.transfer.fromGuest(command, command.data.bytes);
    if (status !== STATUS.ok) return status;
    core.health.writeCommands++;
    core.health.bytesWritten += command.bytes;
    const errno = core.disk.writeNow(command.data, command.bytes, command.fileOffset);
    if (errno !== WOULD_WAIT) return this.#written(command, errno);
    const operation = core.disk.writeLater(command.data, command.bytes, command.fileOffset);
    return core.later(command, operation, this.#written);
  }

  /** The data is in the page cache: that is all, or with FUA and without a write cache only half. */
  readonly #written = (command: Command, errno: number): number => {
    if (errno !== 0) return this.#writeError(errno);
    if ((command.words[12]! & FUA) === 0 && this.#core.features.writeCache) return STATUS.ok;
    return this.#store(command);
  };

  #store(command: Command): number {
    const { disk } = this.#core;
    if (disk.clean) return STATUS.ok;
    return this.#core.later(command, disk.sync(), this.#stored);
  }

  readonly #stored = (_command: Command, errno: number): number => {
    return errno === 0 ? STATUS.ok : this.#writeError(errno);
  };

  #writeZeroes(command: Command): number {
    const core = this.#core;
    core.health.writeCommands++;
    const deallocate = (command.words[12]! & DEALLOCATE) !== 0;
    return core.later(command, core.disk.zero(command.fileOffset, command.bytes, deallocate), this.#written);
  }

  #compare(command: Command): number {
    const core = this.#core;
    const status = core.transfer.resolve(command, command.bytes);
    if (status !== STATUS.ok) return status;
    const errno = core.disk.readNow(command.data, command.bytes, command.fileOffset);
    if (errno !== WOULD_WAIT) return this.#afterCompareRead(command, errno);
    const operation = core.disk.readLater(command.data, command.bytes, command.fileOffset);
    return core.later(command, operation, this.#afterCompareRead);
  }

  readonly #afterCompareRead = (command: Command, errno: number): number => {
    const core = this.#core;
    if (errno !== 0) return this.#mediaError(STATUS.readError);
    this.#compared ??= Buffer.allocUnsafeSlow(TRANSFER_BYTES_MAX);
    const guest = this.#compared;
    const status = core.transfer.fromGuest(command, guest);
    if (status !== STATUS.ok) return status;
    core.health.readCommands++;
    core.health.bytesRead += command.bytes;
    const equal = guest.compare(command.data.bytes, 0, command.bytes, 0, command.bytes) === 0;
    return equal ? STATUS.ok : STATUS.compareFailure;
  };

  async #verify(command: Command): Promise<number> {
    const { disk } = this.#core;
    const { bytes, fileOffset, data } = command;
    for (let done = 0; done < bytes; ) {
      const piece = Math.min(bytes - done, TRANSFER_BYTES_MAX);
      const errno = await disk.readLater(data, piece, fileOffset + done);
      if (errno !== 0) return errno;
      done += piece;
    }
    return 0;
  }

  readonly #verified = (_command: Command, errno: number): number => {
    return errno === 0 ? STATUS.ok : this.#mediaError(STATUS.readError);
  };

  /** 6.7. All ranges are checked before any is touched. Hints about use are for a disk that wears out. */
  #datasetManagement(command: Command): number {
    const core = this.#core;
    const ranges = (command.words[10]! & 0xff) + 1;
    const bytes = ranges * RANGE_BYTES;
    let status = core.transfer.resolve(command, bytes);
    if (status === STATUS.ok) status = core.transfer.fromGuest(command, command.data.bytes);
    if (status !== STATUS.ok) return status;
    const list = command.data.bytes;
    for (let at = 0; at < bytes; at += RANGE_BYTES) {
      const first = u64(list.readUInt32LE(at + 8), list.readUInt32LE(at + 12));
      if (first + list.readUInt32LE(at + 4) > this.#blocks) return STATUS.lbaRange;
    }
    if ((command.words[11]! & ATTRIBUTE_DEALLOCATE) === 0) return STATUS.ok;
    if (core.disk.readonly) return STATUS.writeProtected;
    return core.later(command, this.#deallocate(list, ranges), this.#stored);
  }

  async #deallocate(list: Buffer, ranges: number): Promise<number> {
    const { disk, blockBytes } = this.#core;
    for (let at = 0; at < ranges * RANGE_BYTES; at += RANGE_BYTES) {
      const blocks = list.readUInt32LE(at + 4);
      const first = u64(list.readUInt32LE(at + 8), list.readUInt32LE(at + 12));
      if (blocks === 0) continue;
      const errno = await disk.deallocate(first * blockBytes, blocks * blockBytes);
      if (errno !== 0) return errno;
      // Other commands get a turn between two ranges.
      await new Promise(setImmediate);
    }
    return 0;
  }

  #mediaError(status: number): number {
    this.#core.health.mediaErrors++;
    return status;
  }

  #writeError(errno: number): number {
    return NO_SPACE.has(errno) ? STATUS.capacityExceeded : this.#mediaError(STATUS.writeFault);
  }
}

const KNOWN: ReadonlySet<number> = new Set(Object.values(IO));
