// Command signet-agent keeps the identities of one node fresh and serves them to the node's workloads.
package main

import (
	"fmt"
	"os"

	"github.com/signet-ca/signet/internal/daemon"
)

// version is set at build time.
var version = "devel"

func main() { os.Exit(program().Main()) }

func program() daemon.Program[*loaded] {
	return daemon.Program[*loaded]{
		Name:     "signet-agent",
		Short:    "Keep the identities of one node fresh",
		Version:  version,
		Config:   "/etc/signet/agent.yaml",
		Load:     load,
		Run:      serve,
		RunShort: "Serve the node's workloads until SIGTERM",
		Check: func(l *loaded) (string, error) {
			return fmt.Sprintf("trust domain %s, CA at %s", l.td, l.CA.Address), nil
		},
		CheckShort: "Check the configuration, and change nothing",
	}
}
