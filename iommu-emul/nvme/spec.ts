// Numbers of the NVM Express Base Specification 1.4, with the section each comes from, and the limits this controller
// chose. Pure: constants and arithmetic on them. All fields are little-endian, offsets are bytes.

/** Controller registers in BAR0 (3.1). */
export const REG = {
  capLow: 0x00,
  capHigh: 0x04,
  version: 0x08,
  intms: 0x0c,
  intmc: 0x10,
  cc: 0x14,
  csts: 0x1c,
  aqa: 0x24,
  asqLow: 0x28,
  asqHigh: 0x2c,
  acqLow: 0x30,
  acqHigh: 0x34,
  /** 3.1.24: queue y's tail at 1000h + 2y × 4, its head at 1000h + (2y + 1) × 4 (stride 0). */
  doorbells: 0x1000,
} as const;
/** BAR0: registers up to 1000h, then room for 1536 pairs of doorbells. */
export const BAR0_BYTES = 0x4000;

/** 3.1.2: 1.4.0. */
export const VERSION = 0x0001_0400;

/** CC (3.1.5). */
export const CC = {
  enable: 1,
  /** CSS, MPS and AMS: all 0 here (NVM command set, 4 KiB pages, round robin). */
  mustBeZero: 0x0000_3ff0,
  shnShift: 14,
  iosqesShift: 16,
  iocqesShift: 20,
  /** Bits that exist. */
  all: 0x00ff_fff1,
} as const;
/** CSTS (3.1.6). */
export const CSTS = {
  ready: 1,
  fatal: 2,
  shutdownBusy: 1 << 2,
  shutdownDone: 2 << 2,
  shutdownMask: 3 << 2,
} as const;

export const SQE_BYTES = 64;
export const CQE_BYTES = 16;
export const SQES_LOG2 = 6;
export const CQES_LOG2 = 4;
/** Host memory page: CC.MPS 0 is the only one (CAP.MPSMIN = MPSMAX = 0). */
export const PAGE = 4096;

/** Entries of an I/O queue at most; CAP.MQES is one less. Linux asks for 1024. */
export const IO_QUEUE_ENTRIES_MAX = 1024;
/** CAP.TO in units of 500 ms: how long RDY may take to follow EN. It waits for file operations of before the reset. */
const TIMEOUT_UNITS = 60;
/** CAP (3.1.1): MQES, CQR (queues are contiguous), TO; CSS bit 0 in the high half; DSTRD, MPSMIN, MPSMAX 0. */
export const CAP_LOW = (IO_QUEUE_ENTRIES_MAX - 1) | (1 << 16) | (TIMEOUT_UNITS << 24);
export const CAP_HIGH = 1 << 5;

/**
 * Identify's MDTS: 2^7 pages, 512 KiB in one command. It is as large as a buffer here is; 64 commands that wait for the
 * disk hold 32 MiB at most. It is 128 PRP entries, so one list of up to two pages.
 */
export const MDTS = 7;
export const TRANSFER_BYTES_MAX = PAGE << MDTS;
/** Commands that are under way at a time, over all queues. */
export const COMMANDS_MAX = 64;

/** Asynchronous events that can be asked for at a time (AERL + 1), and aborts (ACL + 1). */
export const ASYNC_REQUESTS_MAX = 4;
export const ABORTS_MAX = 4;
/** Entries of the error log (ELPE + 1). */
export const ERROR_LOG_ENTRIES = 64;

/** SGL descriptors and segments that one command may have: 512 KiB in pieces of 512 bytes. */
export const SGL_DESCRIPTORS_MAX = 1024;
export const SGL_SEGMENTS_MAX = 64;

/** Admin opcodes (figure 139). */
export const ADMIN = {
  deleteSq: 0x00,
  createSq: 0x01,
  getLogPage: 0x02,
  deleteCq: 0x04,
  createCq: 0x05,
  identify: 0x06,
  abort: 0x08,
  setFeatures: 0x09,
  getFeatures: 0x0a,
  asyncEvent: 0x0c,
  doorbellBuffer: 0x7c,
} as const;

/** I/O opcodes (figure 346). */
export const IO = {
  flush: 0x00,
  write: 0x01,
  read: 0x02,
  compare: 0x05,
  writeZeroes: 0x08,
  datasetManagement: 0x09,
  verify: 0x0c,
} as const;

/** Feature identifiers (5.21.1). */
export const FEATURE = {
  arbitration: 0x01,
  powerManagement: 0x02,
  temperatureThreshold: 0x04,
  errorRecovery: 0x05,
  writeCache: 0x06,
  queues: 0x07,
  interruptCoalescing: 0x08,
  interruptVector: 0x09,
  writeAtomicity: 0x0a,
  asyncEvents: 0x0b,
  timestamp: 0x0e,
} as const;

/** Log pages (5.14.1). */
export const LOG = { errors: 0x01, smart: 0x02, firmware: 0x03, effects: 0x05 } as const;

/** Do Not Retry, and More (there is an entry in the error log), in a completion's status field without the phase. */
export const DNR = 1 << 14;
export const MORE = 1 << 13;
const again = (type: number, code: number): number => (type << 8) | code;
const final = (type: number, code: number): number => again(type, code) | DNR;

/**
 * Status fields (4.6.1), bits 31:17 of completion word 3: code, type and Do Not Retry, which is set wherever the same
 * command must fail again, and not where it may succeed: memory not mapped, a file system that is full, a read error.
 */
export const STATUS = {
  ok: 0,
  invalidOpcode: final(0, 0x01),
  invalidField: final(0, 0x02),
  commandIdConflict: final(0, 0x03),
  dataTransferError: again(0, 0x04),
  internalError: again(0, 0x06),
  abortRequested: again(0, 0x07),
  invalidNamespace: final(0, 0x0b),
  commandSequence: final(0, 0x0c),
  sglSegment: final(0, 0x0d),
  sglCount: final(0, 0x0e),
  sglLength: final(0, 0x0f),
  sglType: final(0, 0x11),
  prpOffset: final(0, 0x13),
  writeProtected: final(0, 0x20),
  lbaRange: final(0, 0x80),
  capacityExceeded: again(0, 0x81),
  completionQueueInvalid: final(1, 0x00),
  queueId: final(1, 0x01),
  queueSize: final(1, 0x02),
  asyncLimit: final(1, 0x05),
  interruptVector: final(1, 0x08),
  logPage: final(1, 0x09),
  queueDeletion: final(1, 0x0c),
  notSaveable: final(1, 0x0d),
  notChangeable: final(1, 0x0e),
  notPerNamespace: final(1, 0x0f),
  writeFault: again(2, 0x80),
  readError: again(2, 0x81),
  compareFailure: final(2, 0x85),
} as const;

/** Asynchronous events (5.2.1): word 0 of the completion: type, information, log page that clears it. */
const event = (type: number, info: number, log: number): number => type | (info << 8) | (log << 16);
export const EVENT = {
  invalidDoorbell: event(0, 0x00, LOG.errors),
  invalidDoorbellValue: event(0, 0x01, LOG.errors),
  persistentError: event(0, 0x03, LOG.errors),
  temperature: event(1, 0x01, LOG.smart),
} as const;

/** Every namespace; there is one, with this number. */
export const NSID_ALL = 0xffff_ffff;
export const NSID = 1;

/** Kelvin. What the SMART log says, and the thresholds at which a device gets too warm. */
export const TEMPERATURE = { composite: 303, warning: 343, critical: 353 } as const;

/** A 64-bit value of two words: exact below 2^53, and above every limit here when not. */
export const u64 = (low: number, high: number): number => (low >>> 0) + (high >>> 0) * 2 ** 32;
