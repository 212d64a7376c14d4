// --assign emul:nvme: an NVMe 1.4 controller with one namespace in a file. What the user wrote is checked here; the
// device itself is NvmeController.

import fs from "node:fs";
import { z } from "zod";
import type { DeviceHost, DeviceModel, EmulatedDevice, MachineFacts, PciDescription } from "../device.js";
import { BackingFile, fileBytes } from "./backing-file.js";
import { NvmeController } from "./controller.js";
import { identityOf, PCI_ID } from "./identify.js";
import { BAR0_BYTES } from "./spec.js";

export interface NvmeOptions {
  readonly file: string;
  /** What the file has to have; where there is none, one of this size is made. */
  readonly bytes: number | undefined;
  readonly readonly: boolean;
  readonly blockBytes: number;
  /** What the guest knows the disk by, instead of something made from the file's path. */
  readonly serial: string | undefined;
}

/** Pairs of doorbells in one shadow page, less the admin pair. */
const IO_QUEUES_MAX = 511;
/** LBAs are counted in doubles, and files end at 2^63. */
const BYTES_MAX = 2 ** 50;
const UNITS: Readonly<Record<string, number>> = { "": 1, K: 2 ** 10, M: 2 ** 20, G: 2 ** 30, T: 2 ** 40 };

const size = z.string().transform((text, context) => {
  const match = /^(\d+)(?:([KMGT])i?)?B?$/i.exec(text);
  const bytes = match === null ? Number.NaN : Number(match[1]) * UNITS[(match[2] ?? "").toUpperCase()]!;
  if (bytes >= 1 && bytes <= BYTES_MAX) return bytes;
  context.addIssue("not a size up to 1024T; give a number with K, M, G or T, such as 10G");
  return z.NEVER;
});

const schema = z
  .strictObject({
    file: z
      .string("missing; give file=PATH, a file or a block device")
      .min(1, "empty; give the path of a file or of a block device"),
    size: size.optional(),
    readonly: z.enum(["on", "off"], "not on or off").default("off"),
    lba: z.enum(["512", "4096"], "not 512 or 4096").default("512"),
    serial: z
      .string()
      .regex(/^[!-~]([ -~]{0,18}[!-~])?$/, "not 1 to 20 printable characters")
      .optional(),
  })
  .transform(
    (keys): NvmeOptions => ({
      file: keys.file,
      bytes: keys.size,
      readonly: keys.readonly === "on",
      blockBytes: Number(keys.lba),
      serial: keys.serial,
    }),
  );

/** A namespace of `bytes` bytes can be had. Throws what the user is to read. */
function checkSize(options: NvmeOptions, bytes: number): void {
  const { file, blockBytes } = options;
  if (options.bytes !== undefined && options.bytes !== bytes) {
    throw new Error(
      `${file} has ${bytes} bytes, not ${options.bytes} as size= says; leave size= out, or correct it`,
    );
  }
  if (bytes === 0) throw new Error(`${file} is empty; a disk has at least one block of ${blockBytes} bytes`);
  if (bytes % blockBytes !== 0) {
    throw new Error(
      `${file} has ${bytes} bytes, which are not whole blocks of ${blockBytes}; make it larger`,
    );
  }
  if (bytes > BYTES_MAX)
    throw new Error(`${file} has ${bytes} bytes, more than the ${BYTES_MAX} a disk may have`);
}

const queuesFor = (machine: MachineFacts): number => Math.min(machine.cpus, IO_QUEUES_MAX);

export const nvme: DeviceModel<NvmeOptions> = {
  name: "nvme",
  help: [
    "file=PATH      the disk's data: a raw file or a block device",
    "size=BYTES     makes a sparse file where there is none; otherwise the size it must have",
    "readonly=on    the guest cannot write; the file is opened for reading only",
    "lba=512|4096   bytes in a block, 512 if not given",
    "serial=TEXT    what the guest knows the disk by; made from the file's path if not given",
  ],

  parse: (keys) => schema.parse(keys),

  check(options) {
    const { file } = options;
    const stats = fs.statSync(file, { throwIfNoEntry: false });
    if (stats === undefined) {
      if (options.bytes === undefined) {
        throw new Error(`${file} is not there; create it, or give size= to have a sparse file made`);
      }
      if (options.readonly) throw new Error(`${file} is not there, and with readonly=on it is not made`);
      checkSize(options, options.bytes);
      return;
    }
    const bytes = fileBytes(stats);
    if (bytes < 0) throw new Error(`${file} is neither a file nor a block device`);
    checkSize(options, bytes);
    const { R_OK, W_OK } = fs.constants;
    fs.accessSync(file, options.readonly ? R_OK : R_OK | W_OK);
  },

  describe: (_options, machine): PciDescription => ({
    vendorId: PCI_ID.vendor,
    deviceId: PCI_ID.device,
    subsystemVendorId: PCI_ID.vendor,
    subsystemId: PCI_ID.device,
    revision: 1,
    // Mass storage, non-volatile memory, NVM Express I/O controller.
    classCode: 0x01_08_02,
    bars: [{ index: 0, bytes: BAR0_BYTES, bits: 64 }],
    interrupts: { kind: "msix", vectors: queuesFor(machine) + 1, bar: 4 },
  }),

  create(options: NvmeOptions, host: DeviceHost, machine: MachineFacts): EmulatedDevice {
    const { file, readonly, blockBytes } = options;
    const disk = BackingFile.open(file, { readonly, createBytes: options.bytes }, host.natives);
    try {
      checkSize(options, disk.bytes);
    } catch (error) {
      disk.abandon();
      throw error;
    }
    return new NvmeController(host, {
      disk,
      identity: identityOf(fs.realpathSync(file), options.serial),
      blockBytes,
      ioQueues: queuesFor(machine),
      addressOf: host.natives.addressOf,
    });
  },
};
