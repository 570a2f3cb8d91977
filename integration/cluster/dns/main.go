// Command dns is CoreDNS with the plugins that a cluster for tests needs, so that pods find Services by the names that users
// write. It is a module of its own: what CoreDNS depends on has no place among ours, nor among that of Kubernetes.
package main

import (
	"github.com/coredns/coredns/core/dnsserver"
	"github.com/coredns/coredns/coremain"
	_ "github.com/coredns/coredns/plugin/cache"
	_ "github.com/coredns/coredns/plugin/errors"
	_ "github.com/coredns/coredns/plugin/kubernetes"
	_ "github.com/coredns/coredns/plugin/ready"
)

func main() {
	dnsserver.Directives = []string{"errors", "ready", "kubernetes", "cache"}
	coremain.Run()
}
