// Signet is the operator's tool: it shows what a running CA holds and has issued, inspects certificates, and explains
// every refusal offline.
//
// It speaks to the CA over the CA's admin socket and never opens the store, so it links neither the authority nor the
// agent: whoever can run it can read what the socket's owner lets him read, and nothing in this binary can sign. All
// text that came from a peer (SPIFFE IDs, names that proxies give themselves, rejections) passes one place before it
// reaches the terminal, output.go, where control characters are made visible.
//
// A command is one file, an answer is a result (output.go), an error says what happened, why, and what to type next
// (errors.go). `signet help exit-codes` is the contract with scripts.
package main

import (
	"io"
	"os"
	"time"

	"golang.org/x/term"
)

// version is set at link time, -ldflags "-X main.version=v0.1.0"; empty means that of the module.
var version string

func main() {
	a := &app{
		stdin:   os.Stdin,
		stdout:  os.Stdout,
		stderr:  os.Stderr,
		getenv:  os.Getenv,
		now:     time.Now,
		tty:     isTerminal,
		poll:    time.Second,
		silence: maxSilence,
		version: version,
	}
	os.Exit(a.main(os.Args))
}

func isTerminal(w io.Writer) bool {
	f, ok := w.(*os.File)
	return ok && term.IsTerminal(int(f.Fd()))
}
