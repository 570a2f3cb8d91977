package upstream

import "syscall"

// changed is when anything about a file was last changed, its mode included.
func changed(st *syscall.Stat_t) syscall.Timespec { return st.Ctim }
