// Package nodes runs a real cluster of two nodes inside one machine for tests: the control plane of
// integration/controlplane, and for each node a containerd, a kubelet and a kube-proxy that share namespaces of their own,
// so that each has its /var/lib/kubelet, its /run and its network where users have them, and only there.
//
// All of it, the tests included, lives in a process namespace below the process that was started: when that dies, however
// it dies, the kernel ends every process, mount, interface and firewall rule of the cluster. What is left after a kill is a
// folder and cgroups that bear its name, which the next start removes. That takes Linux and root.
//
// The same tests run on any cluster that a kubeconfig leads to. What they need of the cluster's machines, they skip there.
package nodes
