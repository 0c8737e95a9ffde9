/* linux/fcntl.h: the seals of a memfd. F_SEAL_FUTURE_WRITE since 5.1, F_SEAL_EXEC since 6.3. */
#ifndef PYLUO_UAPI_FCNTL_H
#define PYLUO_UAPI_FCNTL_H

#define F_ADD_SEALS 1033
#define F_GET_SEALS 1034

#define F_SEAL_SEAL 0x0001
#define F_SEAL_SHRINK 0x0002
#define F_SEAL_GROW 0x0004
#define F_SEAL_WRITE 0x0008
#define F_SEAL_FUTURE_WRITE 0x0010
#define F_SEAL_EXEC 0x0020

#endif
