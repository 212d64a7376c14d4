// The capability chain at the end of VFIO's info structures ("For extension of INFO ioctls" in <linux/vfio.h>). Pure.

import { STRUCT } from "../sys/vfio.js";

/** Each capability's id, and the offset of its header in `info`; `first` is the structure's cap_offset, 0 for none. */
export function* capabilities(
  info: DataView,
  first: number,
): Generator<{ readonly id: number; readonly at: number }> {
  const header = STRUCT.vfio_info_cap_header;
  for (
    let at = first;
    at !== 0 && at + header.size <= info.byteLength;
    at = info.getUint32(at + header.next, true)
  ) {
    yield { id: info.getUint16(at + header.id, true), at };
  }
}
