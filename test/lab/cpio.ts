// Writes "newc" cpio archives, the format the kernel unpacks as an initramfs.
// Pure: bytes in, bytes out. The same entries give the same bytes (times are 0, inodes count up).

const S_IFDIR = 0o040000;
const S_IFCHR = 0o020000;
const S_IFREG = 0o100000;
const S_IFLNK = 0o120000;

/**
 * An archive under construction. Paths are relative to the root ("bin/sh"; a leading "/" is dropped); missing
 * parent directories are added with mode 0755. The first entry of a name counts, a second one is an error.
 * Format: the kernel's Documentation/driver-api/early-userspace/buffer-format.rst.
 */
export class CpioArchive {
  readonly #chunks: Buffer[] = [];
  readonly #names = new Set<string>();
  #inode = 1;

  /** Adds a directory. Adding one that is there already is no error. */
  directory(path: string, mode = 0o755): this {
    const name = clean(path);
    if (name === "" || this.#names.has(name)) return this;
    return this.#add(name, S_IFDIR | mode, Buffer.alloc(0));
  }

  /** Adds a regular file. */
  file(path: string, content: Uint8Array | string, mode = 0o644): this {
    return this.#add(clean(path), S_IFREG | mode, Buffer.from(content as Uint8Array));
  }

  /** Adds a symbolic link that points to `target`. */
  symlink(path: string, target: string): this {
    return this.#add(clean(path), S_IFLNK | 0o777, Buffer.from(target));
  }

  /** Adds a character device node. */
  charDevice(path: string, major: number, minor: number, mode = 0o600): this {
    return this.#add(clean(path), S_IFCHR | mode, Buffer.alloc(0), major, minor);
  }

  has(path: string): boolean {
    return this.#names.has(clean(path));
  }

  /** The whole archive with its trailer, padded to 512 bytes. The archive can still be added to afterwards. */
  bytes(): Buffer {
    const body = Buffer.concat([...this.#chunks, entry("TRAILER!!!", 0, 0, Buffer.alloc(0), 0, 0)]);
    return Buffer.concat([body, Buffer.alloc((512 - (body.length % 512)) % 512)]);
  }

  #add(name: string, mode: number, content: Buffer, major = 0, minor = 0): this {
    if (name === "") throw new Error("cpio: an entry needs a name");
    if (this.#names.has(name)) throw new Error(`cpio: ${name} is in the archive already`);
    const slash = name.lastIndexOf("/");
    if (slash > 0) this.directory(name.slice(0, slash));
    this.#names.add(name);
    this.#chunks.push(entry(name, this.#inode++, mode, content, major, minor));
    return this;
  }
}

function clean(path: string): string {
  const parts = path.split("/").filter((part) => part !== "" && part !== ".");
  if (parts.includes("..")) throw new Error(`cpio: ${path} leaves the archive`);
  return parts.join("/");
}

function entry(
  name: string,
  inode: number,
  mode: number,
  content: Buffer,
  major: number,
  minor: number,
): Buffer {
  if (content.length > 0xffffffff) throw new Error(`cpio: ${name} is larger than 4 GiB`);
  const nameBytes = Buffer.from(`${name}\0`);
  const links = (mode & 0o170000) === S_IFDIR ? 2 : 1;
  // magic, then 13 fields of 8 hex digits: ino mode uid gid nlink mtime size dev(2) rdev(2) namesize check
  const fields = [inode, mode, 0, 0, links, 0, content.length, 0, 0, major, minor, nameBytes.length, 0];
  const header = Buffer.from(`070701${fields.map((f) => f.toString(16).padStart(8, "0")).join("")}`);
  return Buffer.concat([pad4(Buffer.concat([header, nameBytes])), pad4(content)]);
}

function pad4(bytes: Buffer): Buffer {
  return bytes.length % 4 === 0 ? bytes : Buffer.concat([bytes, Buffer.alloc(4 - (bytes.length % 4))]);
}
