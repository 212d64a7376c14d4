// Status words: how a result class and an errno become the one number a guest sees, and which class a host errno is.

import { STATUS } from "./abi.js";

/** The errnos that pass through the contract (asm-generic/errno-base.h, errno.h). */
export const ERRNO = {
  EPERM: 1,
  EINTR: 4,
  E2BIG: 7,
  EAGAIN: 11,
  ENOMEM: 12,
  EFAULT: 14,
  EBUSY: 16,
  EEXIST: 17,
  ENODEV: 19,
  EINVAL: 22,
  ENOSPC: 28,
  ERANGE: 34,
  ENOSYS: 38,
  EPROTO: 71,
  EOVERFLOW: 75,
  ESTALE: 116,
  EDQUOT: 122,
} as const;

export const OK = STATUS.ok;

/** Builds a status word; `errno` 0 to 2^24 - 1. */
export const status = (statusClass: number, errno: number): number => statusClass | (errno << 8);

export const statusClassOf = (word: number): number => word & 0xff;
export const statusErrnoOf = (word: number): number => word >>> 8;

/** The guest's mistakes, and how each is named. */
export const INVALID_EINVAL = status(STATUS.invalid, ERRNO.EINVAL);
/** A caller outside the guest's kernel. */
export const INVALID_CPL = status(STATUS.invalid, ERRNO.EPERM);
export const INVALID_CALL = status(STATUS.invalid, ERRNO.ENOSYS);
/** A handle that no device has. */
export const INVALID_HANDLE = status(STATUS.invalid, ERRNO.ENODEV);
/** More bytes, or more entries, than a call takes. */
export const INVALID_TOO_LONG = status(STATUS.invalid, ERRNO.E2BIG);
export const INVALID_NOT_RAM = status(STATUS.invalid, ERRNO.EFAULT);
/** Nothing of this device is mapped there. */
export const INVALID_STALE = status(STATUS.invalid, ERRNO.ESTALE);
/** An identity domain cannot place it where the device or the caller needs it. */
export const INVALID_PLACE = status(STATUS.invalid, ERRNO.ERANGE);
/** The domain has no entry left. */
export const LIMIT_ENTRIES = status(STATUS.limit, ERRNO.ENOSPC);
export const LIMIT_QUOTA = status(STATUS.limit, ERRNO.EDQUOT);
/** The backend unmapped less than was mapped. */
export const LIMIT_STUCK = status(STATUS.limit, ERRNO.EPROTO);
/** The device is no longer there. */
export const GONE = status(STATUS.gone, ERRNO.ENODEV);

/**
 * The class of an errno with which the host refused to map or unmap what the engine asked for. The engine checked
 * the guest's words before, so none of these is the guest's mistake: they are limits, which may pass, unless the
 * device is gone or the call was only interrupted. (VFIO type1: ENOSPC is the entry limit, ENOMEM the locked-memory
 * limit, EFAULT and EAGAIN a page that could not be pinned; linux/drivers/vfio/vfio_iommu_type1.c.)
 */
export function statusOfHostErrno(errno: number): number {
  if (errno === ERRNO.EINTR) return status(STATUS.retry, errno);
  if (errno === ERRNO.ENODEV) return status(STATUS.gone, errno);
  return status(STATUS.limit, errno);
}
