// Command signet-ca is the authority: it attests workloads by their ServiceAccount tokens and issues SVIDs.
package main

import (
	"fmt"
	"log/slog"
	"os"

	"github.com/signet-ca/signet/internal/daemon"
)

// version is set at build time.
var version = "devel"

func main() { os.Exit(program().Main()) }

func program() daemon.Program[*loaded] {
	return daemon.Program[*loaded]{
		Name:       "signet-ca",
		Short:      "The certificate authority of a SPIFFE trust domain",
		Version:    version,
		Config:     "/etc/signet/ca.yaml",
		Load:       load,
		Run:        serve,
		RunShort:   "Serve agents until SIGTERM",
		RunLong:    "Serve agents until SIGTERM. It never makes a root: where there is no record it says so and ends.",
		Check:      check,
		CheckShort: "Check the configuration and the policy, and change nothing",
		Others: []daemon.Command[*loaded]{initCommand(), backupCommand(), restoreCommand(), {
			Name:  "ledger",
			Short: "Check and read what is on record, without the CA",
			Others: []daemon.Command[*loaded]{{
				Name:  "verify",
				Short: "Check every checksum and every number of the ledger",
				Long: `Check every checksum and every number of the ledger in DIR, or in that of the configuration. It changes nothing and
works on a copy, and while the CA runs. Exit codes: 0 all is whole, 3 something is damaged or missing, 1 it cannot be read.`,
				Words: "[DIR]",
				Look:  verifyCommand,
			}, {
				Name:  "export",
				Short: "Print all that is on record, as JSON lines",
				Long: `Print all that is on record in DIR, or in that of the configuration: the ledger and the refusals, oldest first, as JSON
lines. It works on a copy, and while the CA runs; to ask a CA that runs, with filters, use "signet audit".`,
				Words: "[DIR]",
				Look:  exportCommand,
			}},
		}},
	}
}

func check(l *loaded) (string, error) {
	log := slog.New(slog.DiscardHandler)
	reviews, err := openReviewers(l, log)
	if err != nil {
		return "", err
	}
	if _, _, err := attestors(l, log, reviews); err != nil {
		return "", err
	}
	if _, err := openClusters(l, log, nil); err != nil {
		return "", err
	}
	if _, err := openPublisher(l, log, nil); err != nil {
		return "", err
	}
	return fmt.Sprintf("trust domain %s, replica %s", l.td, l.Replica), nil
}
