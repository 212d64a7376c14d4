// Where a command's data is in guest memory (PRPs 4.3, SGLs 4.4), and moving it. All guest memory is reached by the
// DmaPort; every list, length and descriptor is the guest's word and is checked before use, and what is walked is
// bounded by the transfer or by SGL_*_MAX, also when a list points to itself.

import type { DmaPort } from "../device.js";
import type { Command } from "./command.js";
import { PAGE, SGL_DESCRIPTORS_MAX, SGL_SEGMENTS_MAX, STATUS, u64 } from "./spec.js";

const SGL_TYPE = { data: 0, segment: 2, lastSegment: 3 } as const;
const DESCRIPTOR_BYTES = 16;
const PRP_BYTES = 8;

export class Transfer {
  readonly #dma: DmaPort;
  /** A page of a PRP list or of an SGL segment. */
  readonly #list = Buffer.alloc(PAGE);
  readonly #words = new Uint32Array(this.#list.buffer, this.#list.byteOffset, PAGE / 4);

  constructor(dma: DmaPort) {
    this.#dma = dma;
  }

  /** Fills the command's segments with where `bytes` (1 to TRANSFER_BYTES_MAX) go. A status; nothing is moved. */
  resolve(command: Command, bytes: number): number {
    command.segments = 0;
    // PSDT, bits 15:14: PRPs, SGL with a metadata buffer, SGL with a metadata segment, reserved. There is no metadata.
    const kind = (command.words[0]! >>> 14) & 3;
    if (kind === 0) return this.#prps(command, bytes);
    return kind === 3 ? STATUS.invalidField : this.#sgl(command, bytes);
  }

  /** Device to guest: `from` from its start, as long as the segments are. A status. */
  toGuest(command: Command, from: Buffer): number {
    let at = 0;
    for (let i = 0; i < command.segments; i++) {
      const bytes = command.segmentBytes[i]!;
      if (this.#dma.write(command.segmentIova[i]!, from, at, bytes) !== 0) return STATUS.dataTransferError;
      at += bytes;
    }
    return STATUS.ok;
  }

  /** Guest to device: to the start of `into`. Guest memory is read once. A status. */
  fromGuest(command: Command, into: Buffer): number {
    let at = 0;
    for (let i = 0; i < command.segments; i++) {
      const bytes = command.segmentBytes[i]!;
      if (this.#dma.read(command.segmentIova[i]!, into, at, bytes) !== 0) return STATUS.dataTransferError;
      at += bytes;
    }
    return STATUS.ok;
  }

  #prps(command: Command, bytes: number): number {
    const words = command.words;
    const offset = words[6]! % PAGE;
    if (offset & 3) return STATUS.prpOffset;
    const first = Math.min(bytes, PAGE - offset);
    command.addSegment(u64(words[6]!, words[7]!), first);
    let left = bytes - first;
    if (left === 0) return STATUS.ok;
    if (left <= PAGE) {
      if (words[8]! % PAGE) return STATUS.prpOffset;
      command.addSegment(u64(words[8]!, words[9]!), left);
      return STATUS.ok;
    }
    if (words[8]! & (PRP_BYTES - 1)) return STATUS.prpOffset;
    let list = u64(words[8]!, words[9]!);
    let room = (PAGE - (words[8]! % PAGE)) / PRP_BYTES;
    for (;;) {
      const pages = Math.ceil(left / PAGE);
      const entries = Math.min(pages, room);
      if (this.#dma.read(list, this.#list, 0, entries * PRP_BYTES) !== 0) return STATUS.dataTransferError;
      for (let i = 0; i < entries; i++) {
        const low = this.#words[2 * i]!;
        if (low % PAGE) return STATUS.prpOffset;
        const at = u64(low, this.#words[2 * i + 1]!);
        if (pages > room && i === entries - 1) {
          // More pages than the list has room for: its last entry is where it goes on.
          list = at;
          break;
        }
        const part = Math.min(left, PAGE);
        command.addSegment(at, part);
        left -= part;
      }
      if (left === 0) return STATUS.ok;
      room = PAGE / PRP_BYTES;
    }
  }

  #sgl(command: Command, bytes: number): number {
    const words = command.words;
    let kind = words[9]! >>> 24;
    if (kind === SGL_TYPE.data << 4) {
      if (words[8] !== bytes) return STATUS.sglLength;
      command.addSegment(u64(words[6]!, words[7]!), bytes);
      return STATUS.ok;
    }
    // The high half of the byte is the type, the low half the sub type, of which only 0, an address, is for memory.
    if (kind !== SGL_TYPE.segment << 4 && kind !== SGL_TYPE.lastSegment << 4) return STATUS.sglType;
    let at = u64(words[6]!, words[7]!);
    let segmentBytes = words[8]!;
    let left = bytes;
    let descriptors = 0;
    for (let segments = 0; segments < SGL_SEGMENTS_MAX; segments++) {
      if (segmentBytes === 0 || segmentBytes % DESCRIPTOR_BYTES) return STATUS.sglSegment;
      const last = kind === SGL_TYPE.lastSegment << 4;
      let goesOn = false;
      while (segmentBytes > 0) {
        const piece = Math.min(segmentBytes, PAGE);
        if (this.#dma.read(at, this.#list, 0, piece) !== 0) return STATUS.dataTransferError;
        at += piece;
        segmentBytes -= piece;
        for (let i = 0; i < piece / 4; i += 4) {
          if (++descriptors > SGL_DESCRIPTORS_MAX) return STATUS.sglCount;
          const address = u64(this.#words[i]!, this.#words[i + 1]!);
          const length = this.#words[i + 2]!;
          kind = this.#words[i + 3]! >>> 24;
          if (kind === SGL_TYPE.data << 4) {
            if (length > left) return STATUS.sglLength;
            if (length > 0) command.addSegment(address, length);
            left -= length;
            continue;
          }
          if (kind !== SGL_TYPE.segment << 4 && kind !== SGL_TYPE.lastSegment << 4) return STATUS.sglType;
          // A pointer to a further segment stands at a segment's end, and never in the last one.
          if (last || segmentBytes > 0 || i + 4 < piece / 4) return STATUS.sglCount;
          at = address;
          segmentBytes = length;
          goesOn = true;
          break;
        }
        if (goesOn) break;
      }
      if (last) return left === 0 ? STATUS.ok : STATUS.sglLength;
      if (!goesOn) return STATUS.sglSegment;
    }
    return STATUS.sglCount;
  }
}
