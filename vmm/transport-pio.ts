// The host's side of the transport: a call is one 32-bit `out`, its arguments and results are in registers that
// arrive and leave with the exit. Another transport would stand beside this file.

import { FRAME_REGISTERS, PORT } from "../hypercalls/abi.js";
import { type Dispatcher, FRAME_WORDS } from "../hypercalls/dispatcher.js";
import { REGISTER, type RunArea } from "./run-area.js";

const ARGUMENTS = FRAME_REGISTERS.map((name) => REGISTER[name]);

export class PioTransport {
  private readonly frame = new Float64Array(FRAME_WORDS);

  constructor(
    private readonly run: RunArea,
    private readonly dispatcher: Dispatcher,
  ) {}

  /**
   * Whether the I/O exit at hand is a call. KVM reports the `outs` of one element like an `out`; what tells them apart
   * is that an `out` writes EAX.
   */
  isCall(): boolean {
    const { run } = this;
    if (run.ioPort !== PORT || !run.ioIsOut || run.ioWidth !== 4 || run.ioCount !== 1) return false;
    return run.read(run.ioDataOffset, 4) === run.read(REGISTER.rax, 4);
  }

  /** Services the call at hand. RIP still points at the `out`; KVM steps over it on the next entry. */
  service(): void {
    const { run, frame } = this;
    // `out %eax` carries 32 bits; what the upper half of RAX holds is not part of the call.
    frame[0] = run.read(REGISTER.rax, 4);
    for (let i = 0; i < ARGUMENTS.length; i++) frame[i + 1] = run.u64(ARGUMENTS[i]!);
    this.dispatcher.dispatch(frame, run.cpl);
    run.setU64(REGISTER.rax, frame[0]!);
    for (let i = 0; i < ARGUMENTS.length; i++) {
      // A register the call does not name OUT keeps its value, also one that a double cannot hold exactly.
      if (frame[i + 1] !== run.u64(ARGUMENTS[i]!)) run.setU64(ARGUMENTS[i]!, frame[i + 1]!);
    }
    run.markRegistersDirty();
  }
}
