// Command cluster runs one component of a real Kubernetes control plane, so that tests meet the API server that users
// have and not one that we imagined: cluster COMPONENT FLAGS...
//
// It is a module of its own because k8s.io/kubernetes can only be built with replaced modules, and because its
// dependencies have no place among ours. Nothing of ours is in it, and nothing of it is in what we ship.
package main

import (
	"fmt"
	"os"

	"k8s.io/component-base/cli"
	_ "k8s.io/component-base/logs/json/register"
	_ "k8s.io/component-base/metrics/prometheus/clientgo"
	_ "k8s.io/component-base/metrics/prometheus/version"
	apiserver "k8s.io/kubernetes/cmd/kube-apiserver/app"
	controllers "k8s.io/kubernetes/cmd/kube-controller-manager/app"
)

func main() {
	if len(os.Args) < 2 {
		fmt.Fprintln(os.Stderr, "usage: cluster etcd|kube-apiserver|kube-controller-manager FLAGS...")
		os.Exit(2)
	}
	os.Args = os.Args[1:]
	switch os.Args[0] {
	case "etcd":
		os.Exit(etcd(os.Args[1:]))
	case "kube-apiserver":
		os.Exit(cli.Run(apiserver.NewAPIServerCommand()))
	case "kube-controller-manager":
		os.Exit(cli.Run(controllers.NewControllerManagerCommand()))
	default:
		fmt.Fprintln(os.Stderr, "cluster: there is no component", os.Args[0])
		os.Exit(2)
	}
}
