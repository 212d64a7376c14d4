// Which device a trapped access reaches, on the main thread: ranges of ports and of guest-physical addresses.
// Nothing there: reads are all ones, writes are lost, as on a real bus.

/** Bytes of one access. The machine splits accesses of 8 into two of 4, the low one first. */
export type Width = 1 | 2 | 4;

/**
 * A trapped range. `offset` counts from the range's first byte, values are unsigned. An access goes to the range that
 * holds its first byte, and may run over its end. Must not throw.
 */
export interface IoHandler {
  read(offset: number, width: Width): number;
  write(offset: number, width: Width, value: number): void;
}

interface Range {
  readonly first: number;
  readonly bytes: number;
  readonly handler: IoHandler;
}

export class IoBus {
  private readonly ranges: Range[] = [];

  /** Adds a range; it must not overlap another. */
  add(first: number, bytes: number, handler: IoHandler): void {
    this.ranges.push({ first, bytes, handler });
  }

  /** Removes the range that starts at `first`. */
  remove(first: number): void {
    const index = this.ranges.findIndex((range) => range.first === first);
    if (index >= 0) this.ranges.splice(index, 1);
  }

  /** Reads 1 to 8 bytes: the low and the high 32 bits. */
  read(address: number, bytes: number): readonly [number, number] {
    if (bytes === 1 || bytes === 2 || bytes === 4) return [this.readPart(address, bytes), 0];
    if (bytes === 8) return [this.readPart(address, 4), this.readPart(address + 4, 4)];
    // Other lengths are what is left of an access that crossed a page.
    const words: [number, number] = [0, 0];
    for (let i = 0; i < bytes; i++) {
      const word = i < 4 ? 0 : 1;
      words[word] = (words[word] | (this.readPart(address + i, 1) << (8 * (i % 4)))) >>> 0;
    }
    return words;
  }

  /** Writes 1 to 8 bytes given as two 32-bit words. */
  write(address: number, bytes: number, low: number, high: number): void {
    if (bytes === 1 || bytes === 2 || bytes === 4) this.writePart(address, bytes, low);
    else if (bytes === 8) {
      this.writePart(address, 4, low);
      this.writePart(address + 4, 4, high);
    } else {
      for (let i = 0; i < bytes; i++) this.writePart(address + i, 1, (i < 4 ? low : high) >>> (8 * (i % 4)));
    }
  }

  /** The range that holds the access's first byte: what runs over its end is the handler's to see. */
  private find(address: number): Range | undefined {
    return this.ranges.find((range) => address >= range.first && address < range.first + range.bytes);
  }

  private readPart(address: number, width: Width): number {
    const range = this.find(address);
    const value = range === undefined ? 0xffffffff : range.handler.read(address - range.first, width);
    return width === 4 ? value >>> 0 : value & (width === 1 ? 0xff : 0xffff);
  }

  private writePart(address: number, width: Width, value: number): void {
    const range = this.find(address);
    range?.handler.write(
      address - range.first,
      width,
      width === 4 ? value >>> 0 : value & (width === 1 ? 0xff : 0xffff),
    );
  }
}
