// The file or block device behind a namespace. Reads and writes that the page cache can serve are done at once on the
// device's thread, what may wait for a disk in Node's pool. Answers are 0 or a positive errno. Offsets and lengths are
// bytes, were checked by the caller, and lie inside the file.

import fs from "node:fs";
import { promisify } from "node:util";
import type { FileNatives } from "../device.js";
import type { DataBuffer } from "./command.js";

/** The page cache does not have it: to be read later. Not an errno. */
export const WOULD_WAIT = -1;
/** The file ends before it should: ENODATA. */
const SHORT = 61;
const EIO = 5;
const EAGAIN = 11;
const EOPNOTSUPP = 95;
const ZEROES_BYTES = 2 ** 20;

const readLater = promisify(fs.read);
const writeLater = promisify(fs.write);
const syncLater = promisify(fs.fdatasync);

const errnoOf = (error: unknown): number => {
  const errno = (error as NodeJS.ErrnoException).errno;
  // Node's are negative, a native's may be either.
  return typeof errno === "number" && errno !== 0 ? Math.abs(errno) : EIO;
};

/** Bytes of a regular file or of a block device; -1 for anything else. */
export function fileBytes(stats: fs.Stats): number {
  if (stats.isFile()) return stats.size;
  if (!stats.isBlockDevice()) return -1;
  const major = Math.floor(stats.rdev / 2 ** 8) % 2 ** 12;
  const minor = (stats.rdev % 2 ** 8) + Math.floor(stats.rdev / 2 ** 20) * 2 ** 8;
  // In units of 512 bytes, whatever the device's block is (Documentation/ABI/stable/sysfs-block).
  return Number(fs.readFileSync(`/sys/dev/block/${major}:${minor}/size`, "utf8")) * 512;
}

export class BackingFile {
  readonly bytes: number;
  readonly readonly: boolean;
  readonly #fd: number;
  readonly #natives: FileNatives;
  #canPunch: boolean;
  #canReadCached: boolean;
  /** Written since the last sync began; what others wrote before us counts. */
  #dirty = true;
  #syncing: Promise<number> | undefined;
  #nextSync: Promise<number> | undefined;
  #zeroes: Buffer | undefined;

  /** Opens a file; where there is none and `createBytes` is given, makes a sparse one. Throws what the user is to read. */
  static open(
    path: string,
    options: { readonly readonly: boolean; readonly createBytes: number | undefined },
    natives: FileNatives,
  ): BackingFile {
    const { readonly, createBytes } = options;
    const mode = readonly ? fs.constants.O_RDONLY : fs.constants.O_RDWR;
    const create = !readonly && createBytes !== undefined && !fs.existsSync(path);
    const fd = fs.openSync(path, create ? mode | fs.constants.O_CREAT | fs.constants.O_EXCL : mode, 0o600);
    try {
      const locked = natives.lock?.(fd, !readonly) ?? 0;
      if (locked === -EAGAIN) {
        throw new Error(`${path} is in use by another device or program; one of them has to let go of it`);
      }
      if (locked < 0) throw new Error(`${path} cannot be locked: errno ${-locked}`);
      if (create) fs.ftruncateSync(fd, createBytes);
      const bytes = fileBytes(fs.fstatSync(fd));
      if (bytes < 0) throw new Error(`${path} is neither a file nor a block device`);
      return new BackingFile(fd, bytes, readonly, natives);
    } catch (error) {
      fs.closeSync(fd);
      if (create) fs.unlinkSync(path);
      throw error;
    }
  }

  private constructor(fd: number, bytes: number, readonly: boolean, natives: FileNatives) {
    this.#fd = fd;
    this.bytes = bytes;
    this.readonly = readonly;
    this.#natives = natives;
    this.#canReadCached = natives.readCached !== undefined;
    this.#canPunch = natives.punchHole !== undefined;
  }

  /** Reads to the buffer's start, at once; WOULD_WAIT when a disk would have to be asked. */
  readNow(into: DataBuffer, bytes: number, offset: number): number {
    if (this.#canReadCached && into.address !== 0) {
      const done = this.#natives.readCached!(this.#fd, into.address, bytes, offset);
      if (done === bytes) return 0;
      if (done !== -EOPNOTSUPP) return WOULD_WAIT;
      // A file system that cannot tell (tmpfs before Linux 6.6, for one) is taken to be quick.
      this.#canReadCached = false;
    }
    try {
      return fs.readSync(this.#fd, into.bytes, 0, bytes, offset) === bytes ? 0 : WOULD_WAIT;
    } catch (error) {
      return errnoOf(error);
    }
  }

  /**
   * Reads what the page cache has, `bytes` in all, into the memory that struct iovec[] at `vectors` names: 0, or WOULD_WAIT and
   * any of it is filled. Waits for no data, though a disk may have to take the request for it.
   */
  readNowInto(vectors: number, count: number, bytes: number, offset: number): number {
    const done = this.#natives.readCachedInto!(this.#fd, vectors, count, offset);
    if (done === -EOPNOTSUPP) this.#canReadCached = false;
    return done === bytes ? 0 : WOULD_WAIT;
  }

  /** Whether readNowInto() may be asked. */
  get canReadInto(): boolean {
    return this.#canReadCached && this.#natives.readCachedInto !== undefined;
  }

  /** Reads to the buffer's start. Does not reject. */
  async readLater(into: DataBuffer, bytes: number, offset: number): Promise<number> {
    try {
      for (let done = 0; done < bytes; ) {
        const { bytesRead } = await readLater(this.#fd, into.bytes, done, bytes - done, offset + done);
        if (bytesRead === 0) return SHORT;
        done += bytesRead;
      }
      return 0;
    } catch (error) {
      return errnoOf(error);
    }
  }

  /** Writes the buffer's start into the page cache; WOULD_WAIT while a sync is under way, which holds writes up. */
  writeNow(from: DataBuffer, bytes: number, offset: number): number {
    if (this.#syncing !== undefined) return WOULD_WAIT;
    const { write } = this.#natives;
    this.#dirty = true;
    try {
      const done =
        write !== undefined && from.address !== 0
          ? write(this.#fd, from.address, bytes, offset)
          : fs.writeSync(this.#fd, from.bytes, 0, bytes, offset);
      if (done < 0) return -done;
      // The rest is refused with a reason, or goes.
      return done === bytes ? 0 : WOULD_WAIT;
    } catch (error) {
      return errnoOf(error);
    }
  }

  /** Writes the buffer's start. Does not reject. */
  writeLater(from: DataBuffer, bytes: number, offset: number): Promise<number> {
    return this.#writeAll(from.bytes, bytes, offset);
  }

  async #writeAll(from: Buffer, bytes: number, offset: number): Promise<number> {
    try {
      for (let done = 0; done < bytes; ) {
        const { bytesWritten } = await writeLater(this.#fd, from, done, bytes - done, offset + done);
        if (bytesWritten === 0) return EIO;
        done += bytesWritten;
      }
      return 0;
    } catch (error) {
      return errnoOf(error);
    } finally {
      // A sync that began while this was under way may have missed it.
      this.#dirty = true;
    }
  }

  /** Makes a range read as zeroes; `deallocate`: gives the space back if that can be. Does not reject. */
  async zero(offset: number, bytes: number, deallocate: boolean): Promise<number> {
    if (deallocate && (await this.#punch(offset, bytes))) return 0;
    this.#zeroes ??= Buffer.alloc(ZEROES_BYTES);
    for (let done = 0; done < bytes; ) {
      const piece = Math.min(bytes - done, ZEROES_BYTES);
      const errno = await this.#writeAll(this.#zeroes, piece, offset + done);
      if (errno !== 0) return errno;
      done += piece;
    }
    return 0;
  }

  /** Gives a range's space back if that can be; the guest asked, and does not rely on it. Does not reject. */
  async deallocate(offset: number, bytes: number): Promise<number> {
    await this.#punch(offset, bytes);
    return 0;
  }

  async #punch(offset: number, bytes: number): Promise<boolean> {
    if (!this.#canPunch) return false;
    try {
      await this.#natives.punchHole!(this.#fd, offset, bytes);
      return true;
    } catch (error) {
      if (errnoOf(error) === EOPNOTSUPP) this.#canPunch = false;
      return false;
    } finally {
      this.#dirty = true;
    }
  }

  /** Nothing written waits to be stored. */
  get clean(): boolean {
    return !this.#dirty && this.#syncing === undefined;
  }

  /**
   * Stores all that was written before the call. One sync is under way at a time, and all who ask meanwhile share the
   * next. Does not reject. After a failure what was written may be lost, and only those who asked hear of it.
   */
  sync(): Promise<number> {
    if (this.#syncing === undefined) return this.#dirty ? this.#sync() : Promise.resolve(0);
    if (!this.#dirty) return this.#syncing;
    this.#nextSync ??= this.#syncing.then(() => this.#sync());
    return this.#nextSync;
  }

  #sync(): Promise<number> {
    this.#nextSync = undefined;
    this.#dirty = false;
    const sync = this.#syncFile().then((errno) => {
      if (this.#syncing === sync) this.#syncing = undefined;
      return errno;
    });
    this.#syncing = sync;
    return sync;
  }

  async #syncFile(): Promise<number> {
    if (this.readonly) return 0;
    try {
      await syncLater(this.#fd);
      return 0;
    } catch (error) {
      this.#dirty = true;
      return errnoOf(error);
    }
  }

  /** Closes a file that was not used. */
  abandon(): void {
    fs.closeSync(this.#fd);
  }

  /** Stores everything and closes; nothing may be under way. Rejects when storing failed. */
  async close(): Promise<void> {
    const errno = await this.sync();
    fs.closeSync(this.#fd);
    if (errno !== 0)
      throw new Error(`errno ${errno} while the file was stored; what was written last may be lost`);
  }
}
