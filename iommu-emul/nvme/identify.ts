// What the controller and its namespace say of themselves (5.15.2). Pure: builds the structures of 4096 bytes.

import { createHash } from "node:crypto";
import {
  ABORTS_MAX,
  ADMIN,
  ASYNC_REQUESTS_MAX,
  CQES_LOG2,
  ERROR_LOG_ENTRIES,
  IO,
  MDTS,
  NSID,
  PAGE,
  SQES_LOG2,
  TEMPERATURE,
  VERSION,
} from "./spec.js";

/** 1234h is nobody's and the number emulated devices of no vendor use; the device is "NV". */
export const PCI_ID = { vendor: 0x1234, device: 0x4e56 } as const;
const MODEL = "pvdma NVMe";
/** Slot 1 of the firmware page says the same. */
const FIRMWARE = "1.0";

/** Which disk this is, the same every time, so that the guest finds it again. */
export interface DiskIdentity {
  /** 20 characters. */
  readonly serial: string;
  /** RFC 4122, by name (version 5's form). */
  readonly uuid: Buffer;
}

export interface NamespaceFacts {
  readonly blocks: number;
  readonly blockBytes: number;
  readonly readonly: boolean;
}

/** `serial`: what the user chose, up to 20 printable characters; without it the path says which disk it is. */
export function identityOf(path: string, serial: string | undefined): DiskIdentity {
  const name = serial === undefined ? `path ${path}` : `serial ${serial}`;
  const uuid = createHash("sha1").update(`pvdma nvme ${name}`).digest().subarray(0, 16);
  uuid[6] = (uuid[6]! & 0x0f) | 0x50;
  uuid[8] = (uuid[8]! & 0x3f) | 0x80;
  return { serial: serial ?? `PVDMA${uuid.toString("hex").slice(0, 12).toUpperCase()}`, uuid };
}

const text = (page: Buffer, at: number, bytes: number, value: string): void => {
  page.write(value.padEnd(bytes), at, bytes, "ascii");
};

const writeU64 = (page: Buffer, at: number, value: number): void => {
  page.writeUInt32LE(value % 2 ** 32, at);
  page.writeUInt32LE(Math.floor(value / 2 ** 32), at + 4);
};

/** CNS 01h (figure 247). */
export function identifyController(disk: DiskIdentity, capacityBytes: number): Buffer {
  const page = Buffer.alloc(PAGE);
  page.writeUInt16LE(PCI_ID.vendor, 0);
  page.writeUInt16LE(PCI_ID.vendor, 2);
  text(page, 4, 20, disk.serial);
  text(page, 24, 40, MODEL);
  text(page, 64, 8, FIRMWARE);
  // RAB: bursts of 2^4. IEEE: an OUI with the bit of those that are assigned locally.
  page[72] = 4;
  page.set([0x00, 0x54, 0x52], 73);
  page[77] = MDTS;
  page.writeUInt32LE(VERSION, 80);
  // RTD3E: a shutdown stores the file, microseconds.
  page.writeUInt32LE(60_000_000, 88);
  // CNTRLTYPE: I/O controller.
  page[111] = 1;
  // OACS: Doorbell Buffer Config.
  page.writeUInt16LE(1 << 8, 256);
  page[258] = ABORTS_MAX - 1;
  page[259] = ASYNC_REQUESTS_MAX - 1;
  // FRMW: one slot, read-only.
  page[260] = 0b11;
  // LPA: commands supported and effects, extended data (offsets and long lengths).
  page[261] = 0b110;
  page[262] = ERROR_LOG_ENTRIES - 1;
  page.writeUInt16LE(TEMPERATURE.warning, 266);
  page.writeUInt16LE(TEMPERATURE.critical, 268);
  writeU64(page, 280, capacityBytes);
  page[512] = (SQES_LOG2 << 4) | SQES_LOG2;
  page[513] = (CQES_LOG2 << 4) | CQES_LOG2;
  page.writeUInt32LE(1, 516);
  // ONCS: compare, dataset management, write zeroes, save and select, timestamp, verify.
  page.writeUInt16LE(0b1101_1101, 520);
  // VWC: there is a volatile write cache, and a flush may name all namespaces.
  page[525] = 0b111;
  // SGLS: with any alignment and granularity.
  page.writeUInt32LE(1, 536);
  const hex = disk.uuid.toString("hex");
  const parts = [hex.slice(0, 8), hex.slice(8, 12), hex.slice(12, 16), hex.slice(16, 20), hex.slice(20)];
  page.write(`nqn.2014-08.org.nvmexpress:uuid:${parts.join("-")}`, 768, "ascii");
  return page;
}

/** CNS 00h (figure 245). */
export function identifyNamespace(facts: NamespaceFacts): Buffer {
  const page = Buffer.alloc(PAGE);
  for (const at of [0, 8, 16]) writeU64(page, at, facts.blocks);
  // NSFEAT: the preferred sizes below are given. They are a page of the file in blocks, less one.
  page[24] = 1 << 4;
  // DLFEAT: deallocated blocks read as zeroes, Write Zeroes can deallocate.
  page[33] = 0b1001;
  writeU64(page, 48, facts.blocks * facts.blockBytes);
  for (const at of [64, 66, 68, 70, 72]) page.writeUInt16LE(PAGE / facts.blockBytes - 1, at);
  page[99] = facts.readonly ? 1 : 0;
  // LBAF0: no metadata.
  page[130] = Math.log2(facts.blockBytes);
  return page;
}

/** CNS 03h (figure 246): the UUID. */
export function identifyDescriptors(disk: DiskIdentity): Buffer {
  const page = Buffer.alloc(PAGE);
  page.set([3, 16, 0, 0], 0);
  page.set(disk.uuid, 4);
  return page;
}

/** CNS 02h: active namespaces above `after`. */
export function namespaceList(after: number): Buffer {
  const page = Buffer.alloc(PAGE);
  if (after < NSID) page.writeUInt32LE(NSID, 0);
  return page;
}

/** Log page 03h (figure 197). */
export function firmwarePage(): Buffer {
  const page = Buffer.alloc(512);
  page[0] = 1;
  text(page, 8, 8, FIRMWARE);
  return page;
}

/** Log page 05h (figure 199): supported, and for those that write, that logical blocks change. */
export function effectsPage(): Buffer {
  const page = Buffer.alloc(4096);
  for (const opcode of Object.values(ADMIN)) page.writeUInt32LE(1, opcode * 4);
  for (const opcode of Object.values(IO)) page.writeUInt32LE(1, 1024 + opcode * 4);
  for (const opcode of [IO.write, IO.writeZeroes, IO.datasetManagement])
    page.writeUInt32LE(0b11, 1024 + opcode * 4);
  return page;
}
