/* linux/memfd.h: anonymous files in memory. MFD_NOEXEC_SEAL and MFD_EXEC since 6.3. */
#ifndef PYLUO_UAPI_MEMFD_H
#define PYLUO_UAPI_MEMFD_H

#define MFD_CLOEXEC 0x0001U
#define MFD_ALLOW_SEALING 0x0002U
#define MFD_HUGETLB 0x0004U
#define MFD_NOEXEC_SEAL 0x0008U
#define MFD_EXEC 0x0010U

/* A huge page size is its base-2 logarithm, shifted. */
#define MFD_HUGE_SHIFT 26
#define MFD_HUGE_MASK 0x3f
#define MFD_HUGE_64KB (16U << 26)
#define MFD_HUGE_512KB (19U << 26)
#define MFD_HUGE_1MB (20U << 26)
#define MFD_HUGE_2MB (21U << 26)
#define MFD_HUGE_8MB (23U << 26)
#define MFD_HUGE_16MB (24U << 26)
#define MFD_HUGE_32MB (25U << 26)
#define MFD_HUGE_256MB (28U << 26)
#define MFD_HUGE_512MB (29U << 26)
#define MFD_HUGE_1GB (30U << 26)
#define MFD_HUGE_2GB (31U << 26)
#define MFD_HUGE_16GB (34U << 26)

#endif
