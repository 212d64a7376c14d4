// The host's side of the transport: a call is one 32-bit `out`, its arguments and results are in registers that
// arrive and leave with the exit. Another transport would stand beside this file.

import { FRAME_REGISTERS, PORT } from "../hypercalls/abi.js";
import { type Dispatcher, FRAME_WORDS } from "../hypercalls/dispatcher.js";
import { REGISTER, type RunArea } from "./run-area.js";

const [FIRST, SECOND, THIRD, FOURTH, FIFTH] = FRAME_REGISTERS;

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

  /**
   * Services the call at hand. RIP still points at the `out`; KVM steps over it on the next entry. Without loops: half of
   * what a call costs here is getting its registers.
   */
  service(): void {
    const { run, frame } = this;
    const first = run.u64(REGISTER[FIRST]);
    const second = run.u64(REGISTER[SECOND]);
    const third = run.u64(REGISTER[THIRD]);
    const fourth = run.u64(REGISTER[FOURTH]);
    const fifth = run.u64(REGISTER[FIFTH]);
    // `out %eax` carries 32 bits; what the upper half of RAX holds is not part of the call.
    frame[0] = run.read(REGISTER.rax, 4);
    frame[1] = first;
    frame[2] = second;
    frame[3] = third;
    frame[4] = fourth;
    frame[5] = fifth;
    this.dispatcher.dispatch(frame, run.cpl);
    run.setU64(REGISTER.rax, frame[0]);
    // A register the call does not name OUT keeps its value, also one that a double cannot hold exactly.
    if (frame[1] !== first) run.setU64(REGISTER[FIRST], frame[1]);
    if (frame[2] !== second) run.setU64(REGISTER[SECOND], frame[2]);
    if (frame[3] !== third) run.setU64(REGISTER[THIRD], frame[3]);
    if (frame[4] !== fourth) run.setU64(REGISTER[FOURTH], frame[4]);
    if (frame[5] !== fifth) run.setU64(REGISTER[FIFTH], frame[5]);
    run.markRegistersDirty();
  }
}
