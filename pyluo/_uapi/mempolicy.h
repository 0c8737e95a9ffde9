/* linux/mempolicy.h: on which NUMA nodes memory is allocated. MPOL_LOCAL since 3.8,
 * MPOL_PREFERRED_MANY since 5.15, MPOL_WEIGHTED_INTERLEAVE since 6.9. */
#ifndef PYLUO_UAPI_MEMPOLICY_H
#define PYLUO_UAPI_MEMPOLICY_H

#define MPOL_DEFAULT 0
#define MPOL_PREFERRED 1
#define MPOL_BIND 2
#define MPOL_INTERLEAVE 3
#define MPOL_LOCAL 4
#define MPOL_PREFERRED_MANY 5
#define MPOL_WEIGHTED_INTERLEAVE 6

#endif
