package audit

import (
	"os"
	"runtime"
	"syscall"
)

// lull tells when this process has nothing to do but what waits for the ledger. Whoever is about to sync waits for it, so that
// all who can still share the sync do. Yielding alone is not enough: the scheduler asks what has come over the network only
// when nobody can run, and requests that have come are most of those who will want to share. So it is asked for a byte that
// we write ourselves, which arrives with everything else that has arrived, and at once where nothing has.
type lull struct {
	r, w *os.File
	conn syscall.RawConn // of r
	one  [1]byte
}

func newLull() (*lull, error) {
	r, w, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	l := &lull{r: r, w: w}
	if l.conn, err = r.SyscallConn(); err != nil {
		l.close()
		return nil, err
	}
	return l, nil
}

// wait is for one goroutine at a time.
func (l *lull) wait() {
	asked := false
	_ = l.conn.Read(func(fd uintptr) bool { // it fails once the pipe is closed, and then nobody waits
		if !asked { // only now is the poller ready to remember that the byte came
			asked = true
			_, err := l.w.Write(l.one[:])
			return err != nil
		}
		n, err := syscall.Read(int(fd), l.one[:])
		return n > 0 || err != syscall.EAGAIN && err != syscall.EINTR
	})
	runtime.Gosched() // after those who came with it
}

func (l *lull) close() {
	l.r.Close()
	l.w.Close()
}
