// The admin command set (5). Pages and queue ids are the guest's word and checked here; data goes through one buffer
// of a page or through the command's own.

import { type Command, PENDING } from "./command.js";
import type { ControllerCore } from "./core.js";
import { WARNING } from "./health.js";
import {
  type DiskIdentity,
  effectsPage,
  firmwarePage,
  identifyController,
  identifyDescriptors,
  identifyNamespace,
  namespaceList,
} from "./identify.js";
import { CompletionQueue, SubmissionQueue } from "./queues.js";
import {
  ADMIN,
  EVENT,
  FEATURE,
  IO,
  IO_QUEUE_ENTRIES_MAX,
  LOG,
  NSID,
  NSID_ALL,
  PAGE,
  STATUS,
  TRANSFER_BYTES_MAX,
  u64,
} from "./spec.js";

/** FUSE and PSDT, bits 9:8 and 15:14 of word 0: admin commands use PRPs here, and are never fused. */
const FUSE_PSDT_MASK = 0xc300;
const CNS = { namespace: 0, controller: 1, activeNamespaces: 2, descriptors: 3 } as const;
/** Word 10 of Set Features: save. */
const SAVE = 2 ** 31;
const NOT_ABORTED = 1;
const TIMESTAMP_BYTES = 8;

export class AdminCommands {
  readonly #core: ControllerCore;
  readonly #disk: DiskIdentity;
  readonly #page = Buffer.alloc(PAGE);

  constructor(core: ControllerCore, disk: DiskIdentity) {
    this.#core = core;
    this.#disk = disk;
  }

  /** A status, or PENDING; word 0 of the completion is command.result. */
  run(command: Command): number {
    const core = this.#core;
    if ((command.words[0]! & FUSE_PSDT_MASK) !== 0) return STATUS.invalidField;
    switch (command.opcode) {
      case ADMIN.deleteSq:
        return this.#deleteSubmissionQueue(command);
      case ADMIN.createSq:
        return this.#createSubmissionQueue(command);
      case ADMIN.getLogPage:
        return this.#getLogPage(command);
      case ADMIN.deleteCq:
        return this.#deleteCompletionQueue(command);
      case ADMIN.createCq:
        return this.#createCompletionQueue(command);
      case ADMIN.identify:
        return this.#identify(command);
      case ADMIN.abort:
        return this.#abort(command);
      case ADMIN.setFeatures:
        return this.#setFeatures(command);
      case ADMIN.getFeatures:
        return this.#getFeatures(command);
      case ADMIN.asyncEvent:
        if (!core.events.request(command.id)) return STATUS.asyncLimit;
        core.drop(command);
        return PENDING;
      case ADMIN.doorbellBuffer:
        return this.#doorbellBuffer(command);
      default:
        return STATUS.invalidOpcode;
    }
  }

  #send(command: Command, from: Buffer, bytes: number): number {
    const { transfer } = this.#core;
    const status = transfer.resolve(command, bytes);
    return status === STATUS.ok ? transfer.toGuest(command, from) : status;
  }

  /** 5.15. */
  #identify(command: Command): number {
    const { disk, blockBytes } = this.#core;
    const namespace = command.namespace;
    switch (command.words[10]! & 0xff) {
      case CNS.namespace: {
        if (namespace !== NSID) return STATUS.invalidNamespace;
        const facts = {
          blocks: Math.floor(disk.bytes / blockBytes),
          blockBytes,
          readonly: disk.readonly,
        };
        return this.#send(command, identifyNamespace(facts), PAGE);
      }
      case CNS.controller:
        return this.#send(command, identifyController(this.#disk, disk.bytes), PAGE);
      case CNS.activeNamespaces:
        if (namespace >= NSID_ALL - 1) return STATUS.invalidNamespace;
        return this.#send(command, namespaceList(namespace), PAGE);
      case CNS.descriptors:
        if (namespace !== NSID) return STATUS.invalidNamespace;
        return this.#send(command, identifyDescriptors(this.#disk), PAGE);
      default:
        return STATUS.invalidField;
    }
  }

  /** 5.3. */
  #createCompletionQueue(command: Command): number {
    const core = this.#core;
    const words = command.words;
    const id = words[10]! & 0xffff;
    const entries = (words[10]! >>> 16) + 1;
    if (id === 0 || id > core.ioQueues || core.completionQueues[id] !== undefined) return STATUS.queueId;
    if (entries < 2 || entries > IO_QUEUE_ENTRIES_MAX) return STATUS.queueSize;
    if (words[6]! % PAGE) return STATUS.prpOffset;
    // PC, physically contiguous, is asked for by CAP.CQR.
    if ((words[11]! & 1) === 0 || !core.entrySizesSet) return STATUS.invalidField;
    const vector = words[11]! >>> 16;
    if (vector > core.ioQueues) return STATUS.interruptVector;
    const queue = new CompletionQueue(id, u64(words[6]!, words[7]!), entries, vector, (words[11]! & 2) !== 0);
    core.completionQueues[id] = queue;
    core.adoptShadow(undefined, queue);
    return STATUS.ok;
  }

  /** 5.4. */
  #createSubmissionQueue(command: Command): number {
    const core = this.#core;
    const words = command.words;
    const id = words[10]! & 0xffff;
    const entries = (words[10]! >>> 16) + 1;
    const completionId = words[11]! >>> 16;
    if (id === 0 || id > core.ioQueues || core.submissionQueues[id] !== undefined) return STATUS.queueId;
    if (entries < 2 || entries > IO_QUEUE_ENTRIES_MAX) return STATUS.queueSize;
    if (words[6]! % PAGE) return STATUS.prpOffset;
    if ((words[11]! & 1) === 0 || !core.entrySizesSet) return STATUS.invalidField;
    if (completionId === 0 || completionId > core.ioQueues) return STATUS.queueId;
    const completions = core.completionQueues[completionId];
    if (completions === undefined) return STATUS.completionQueueInvalid;
    const queue = new SubmissionQueue(id, u64(words[6]!, words[7]!), entries, completions);
    completions.users++;
    core.submissionQueues[id] = queue;
    core.adoptShadow(queue, undefined);
    return STATUS.ok;
  }

  /** 5.6. Nothing more is fetched from it; ends when the last of its commands has. */
  #deleteSubmissionQueue(command: Command): number {
    const core = this.#core;
    const id = command.words[10]! & 0xffff;
    const queue = id === 0 ? undefined : core.submissionQueues[id];
    if (queue === undefined || queue.deletion !== undefined) return STATUS.queueId;
    queue.deletion = command;
    if (queue.underWay > 0) return PENDING;
    this.#remove(queue);
    return STATUS.ok;
  }

  /** The last command of a queue that is being deleted has ended. */
  deleted(queue: SubmissionQueue): void {
    this.#remove(queue);
    this.#core.complete(queue.deletion!, STATUS.ok);
  }

  #remove(queue: SubmissionQueue): void {
    queue.completions.users--;
    this.#core.submissionQueues[queue.id] = undefined;
  }

  /** 5.5. */
  #deleteCompletionQueue(command: Command): number {
    const queues = this.#core.completionQueues;
    const id = command.words[10]! & 0xffff;
    const queue = id === 0 ? undefined : queues[id];
    if (queue === undefined) return STATUS.queueId;
    if (queue.users > 0) return STATUS.queueDeletion;
    if (queue.dirty) this.#core.flush(queue);
    queues[id] = undefined;
    return STATUS.ok;
  }

  /**
   * 5.1. Asynchronous event requests, reads and flushes that wait are ended at once; a write that is under way is not,
   * for it could still land on what the guest writes next.
   */
  #abort(command: Command): number {
    const core = this.#core;
    const queueId = command.words[10]! & 0xffff;
    const id = command.words[10]! >>> 16;
    command.result = NOT_ABORTED;
    if (queueId === 0) {
      if (core.events.abort(id)) command.result = 0;
      return STATUS.ok;
    }
    for (const victim of core.commands) {
      if (victim.queue?.id !== queueId || victim.id !== id || !victim.waiting || victim.aborted) continue;
      if (ABORTABLE.has(victim.opcode)) {
        command.result = 0;
        core.complete(victim, STATUS.abortRequested);
      }
      break;
    }
    return STATUS.ok;
  }

  /** 5.21. */
  #setFeatures(command: Command): number {
    const core = this.#core;
    const feature = command.words[10]! & 0xff;
    if (command.words[10]! >= SAVE) return STATUS.notSaveable;
    if (feature === FEATURE.timestamp) {
      let status = core.transfer.resolve(command, TIMESTAMP_BYTES);
      if (status === STATUS.ok) status = core.transfer.fromGuest(command, this.#page);
      if (status === STATUS.ok) core.features.setTimestamp(this.#page);
      return status;
    }
    const exist =
      core.submissionQueues.some((queue) => queue !== undefined && queue.id > 0) ||
      core.completionQueues.some((queue) => queue !== undefined && queue.id > 0);
    const { status, result } = core.features.set(feature, command.namespace, command.words[11]!, exist);
    if (status === STATUS.ok) this.#checkTemperature();
    command.result = result;
    return status;
  }

  /** The threshold moved over or below what the temperature is, or the guest wants to be told now. */
  #checkTemperature(): void {
    const { features, events } = this.#core;
    if (features.temperatureWarning && (features.eventWarnings & WARNING.temperature) !== 0) {
      events.raise(EVENT.temperature);
    }
  }

  /** 5.9. */
  #getFeatures(command: Command): number {
    const core = this.#core;
    const feature = command.words[10]! & 0xff;
    const select = (command.words[10]! >>> 8) & 7;
    const answer = core.features.get(feature, command.namespace, select, command.words[11]!);
    let status = answer.status;
    if (status === STATUS.ok && feature === FEATURE.timestamp && select !== 3) {
      core.features.timestamp(this.#page);
      status = this.#send(command, this.#page, TIMESTAMP_BYTES);
    }
    command.result = answer.result;
    return status;
  }

  /** 5.14. What lies behind a page's end reads as zeroes. */
  #getLogPage(command: Command): number {
    const core = this.#core;
    const words = command.words;
    const id = words[10]! & 0xff;
    const bytes = (((words[10]! >>> 16) | ((words[11]! & 0xffff) << 16)) >>> 0) * 4 + 4;
    const offset = u64(words[12]!, words[13]!);
    let page: Buffer;
    switch (id) {
      case LOG.errors:
        page = core.health.errorPage();
        break;
      case LOG.smart:
        page = core.health.smartPage(core.features.temperatureWarning ? WARNING.temperature : 0);
        break;
      case LOG.firmware:
        page = firmwarePage();
        break;
      case LOG.effects:
        page = effectsPage();
        break;
      default:
        return STATUS.logPage;
    }
    // LPA bit 0 is clear: the SMART page is the controller's, not a namespace's.
    if (id === LOG.smart && command.namespace !== 0 && command.namespace !== NSID_ALL)
      return STATUS.invalidField;
    if (words[12]! & 3 || offset > page.length || bytes > TRANSFER_BYTES_MAX) return STATUS.invalidField;
    const data = command.data.bytes;
    const there = page.copy(data, 0, offset, Math.min(page.length, offset + bytes));
    data.fill(0, there, bytes);
    const status = this.#send(command, data, bytes);
    // RAE, bit 15, keeps the event.
    if (status === STATUS.ok && (words[10]! & 0x8000) === 0) core.events.logRead(id);
    return status;
  }

  /** 5.7. */
  #doorbellBuffer(command: Command): number {
    const core = this.#core;
    const words = command.words;
    if (words[6]! % PAGE || words[8]! % PAGE) return STATUS.invalidField;
    if (!core.doorbells.enable(u64(words[6]!, words[7]!), u64(words[8]!, words[9]!))) {
      return STATUS.dataTransferError;
    }
    for (const queue of core.submissionQueues) core.adoptShadow(queue, undefined);
    for (const queue of core.completionQueues) core.adoptShadow(undefined, queue);
    return STATUS.ok;
  }
}

/** Those that change nothing. */
const ABORTABLE: ReadonlySet<number> = new Set([IO.flush, IO.read, IO.compare, IO.verify]);
