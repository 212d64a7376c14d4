// What commands need of the controller. Types only: the command files know no registers, the controller no commands.

import type { DmaPort } from "../device.js";
import type { BackingFile } from "./backing-file.js";
import type { Command } from "./command.js";
import type { DoorbellBuffer } from "./doorbell-buffer.js";
import type { AsyncEvents } from "./events.js";
import type { Features } from "./features.js";
import type { Health } from "./health.js";
import type { CompletionQueue, SubmissionQueue } from "./queues.js";
import type { Transfer } from "./transfer.js";

export interface ControllerCore {
  readonly dma: DmaPort;
  readonly disk: BackingFile;
  readonly blockBytes: number;
  readonly ioQueues: number;
  readonly health: Health;
  readonly events: AsyncEvents;
  readonly features: Features;
  readonly transfer: Transfer;
  readonly doorbells: DoorbellBuffer;
  /** By queue id; 0 is the admin pair. */
  readonly submissionQueues: (SubmissionQueue | undefined)[];
  readonly completionQueues: (CompletionQueue | undefined)[];
  /** CC.IOSQES and CC.IOCQES are what the sizes of entries are (3.1.5). */
  readonly entrySizesSet: boolean;
  /** Commands under way and free ones. */
  readonly commands: readonly Command[];

  /** Ends a command with one of STATUS, and its `result`. */
  complete(command: Command, status: number): void;
  /** Ends a command without a completion: its request waits elsewhere. */
  drop(command: Command): void;
  /** Writes what was posted to a queue, and signals it. */
  flush(queue: CompletionQueue): void;
  /**
   * Goes on with `then` when `operation`, which answers with an errno, is done, unless the command or the controller
   * ended meanwhile. `then` answers with a status, or PENDING. Returns PENDING.
   */
  later(
    command: Command,
    operation: Promise<number>,
    then: (command: Command, errno: number) => number,
  ): number;
  /** The guest's doorbell pages changed or a queue came: takes the shadow values of now as where the queues are. */
  adoptShadow(submission: SubmissionQueue | undefined, completion: CompletionQueue | undefined): void;
}
