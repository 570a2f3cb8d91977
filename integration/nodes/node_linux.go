package nodes

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/signet-ca/signet/integration/controlplane"
)

// nodeVariable names the environment variable with the folder of a node, for the first process of its namespaces.
const nodeVariable = "SIGNET_NODES_NODE"

// Node is one real node: a machine as far as its parts can tell.
type Node struct {
	Name    string
	Address netip.Addr
	Dir     string // what outlives a reboot: its disk, and logs

	t       testing.TB
	binary  string // of the program that is every component
	number  int
	init    *process // the first process of its namespaces
	parts   map[string]*process
	cleanup sync.Once
}

// process is one that runs, or ran.
type process struct {
	cmd   *exec.Cmd
	ended chan struct{}
}

// kill ends it and waits until it has ended.
func (p *process) kill() {
	_ = p.cmd.Process.Kill()
	<-p.ended
}

// bridge connects the nodes and the control plane, which is at controlAddress.
const bridge = "nodes"

var (
	controlAddress = netip.MustParseAddr("192.168.77.254")
	dnsAddress     = netip.MustParseAddr("10.96.0.10")
)

// podNetwork is what the pods of the node with this number have their addresses from.
func podNetwork(number int) string { return fmt.Sprintf("10.244.%d.0/24", number) }

// makeBridge readies the network that the nodes join.
func makeBridge(t testing.TB) {
	t.Helper()
	ip(t, "link", "add", bridge, "type", "bridge")
	ip(t, "addr", "add", controlAddress.String()+"/24", "dev", bridge)
	ip(t, "link", "set", bridge, "up")
}

func ip(t testing.TB, args ...string) {
	t.Helper()
	if out, err := exec.Command("ip", args...).CombinedOutput(); err != nil {
		t.Fatalf("ip %s: %v: %s", strings.Join(args, " "), err, out)
	}
}

// newNode writes what a node's disk has before its first start.
func newNode(t testing.TB, c *controlplane.ControlPlane, number int) *Node {
	t.Helper()
	name := "node" + strconv.Itoa(number)
	n := &Node{
		Name: name, Address: netip.AddrFrom4([4]byte{192, 168, 77, byte(number)}), Dir: filepath.Join(c.Dir, name),
		t: t, binary: os.Getenv(controlplane.BinaryVariable), number: number, parts: make(map[string]*process),
	}
	for _, dir := range []string{"kubelet", "cni", "leases", "log", "containerd", "volumes"} {
		if err := os.MkdirAll(filepath.Join(n.Dir, dir), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := c.Certify(name, "system:node:"+name, []string{"system:nodes"}, n.Address); err != nil {
		t.Fatal(err)
	}
	for file, text := range n.files(c) {
		if err := os.WriteFile(n.file(file), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	c.UserKubeconfig(t, name)
	if err := makeCgroups(n.cgroup()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(n.Stop)
	return n
}

func (n *Node) file(name string) string { return filepath.Join(n.Dir, name) }

// cgroup is its own: two kubelets under one root would remove each other's pods.
func (n *Node) cgroup() string { return filepath.Base(os.TempDir()) + "/" + n.Name }

// kubeconfig is what the node's own user, or that of its proxy, reaches the API server with.
func (n *Node) kubeconfig(user string) string { return filepath.Join(n.Dir, "..", user+".kubeconfig") }

// files are the configuration of its parts.
func (n *Node) files(c *controlplane.ControlPlane) map[string]string {
	plugins := "/usr/lib/cni"
	if _, err := os.Stat(filepath.Join(plugins, "ptp")); err != nil {
		plugins = "/opt/cni/bin"
	}
	return map[string]string{
		"containerd.toml": fmt.Sprintf(`version = 2
root = %q
[plugins."io.containerd.internal.v1.opt"]
  path = %q
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = %q
  restrict_oom_score_adj = true
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = %q
    conf_dir = %q
`, n.file("containerd"), n.file("containerd/opt"), probeImage, plugins, n.file("cni")),
		// Every packet of a pod passes the node, that to a pod beside it too: a Service's answer must go back as it came.
		"cni/10-pods.conflist": fmt.Sprintf(`{"cniVersion": "0.4.0", "name": "pods", "plugins": [{"type": "ptp",
			"ipam": {"type": "host-local", "ranges": [[{"subnet": %q}]], "routes": [{"dst": "0.0.0.0/0"}]}}]}`, podNetwork(n.number)),
		"resolv.conf": "nameserver 192.0.2.1\n", // nobody: there is no world outside
		// Images can be imported, not pulled, so none is ever removed, however full a disk may seem.
		"kubelet.yaml": fmt.Sprintf(`
apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
cgroupDriver: cgroupfs
cgroupRoot: /%s
failCgroupV1: false
failSwapOn: false
maxPods: 200
containerRuntimeEndpoint: unix:///run/containerd/containerd.sock
authentication: {anonymous: {enabled: false}, webhook: {enabled: true}, x509: {clientCAFile: %q}}
authorization: {mode: Webhook}
tlsCertFile: %q
tlsPrivateKeyFile: %q
evictionHard: {imagefs.available: "0%%", nodefs.available: "0%%", nodefs.inodesFree: "0%%"}
imageGCHighThresholdPercent: 100
enforceNodeAllocatable: []
resolvConf: %q
volumePluginDir: /var/lib/kubelet/volume-plugins
clusterDNS: [%s]
clusterDomain: cluster.local
`, n.cgroup(), c.CAFile, filepath.Join(c.Dir, n.Name+".crt"), filepath.Join(c.Dir, n.Name+".key"), n.file("resolv.conf"), dnsAddress),
		"proxy.yaml": fmt.Sprintf(`
apiVersion: kubeproxy.config.k8s.io/v1alpha1
kind: KubeProxyConfiguration
mode: nftables
clusterCIDR: 10.244.0.0/16
hostnameOverride: %s
conntrack: {maxPerCore: 0}
clientConnection: {kubeconfig: %q}
`, n.Name, n.kubeconfig("admin")),
	}
}

// Boot makes the node's namespaces and starts its parts, at first and after Crash.
func (n *Node) Boot(t testing.TB) {
	t.Helper()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	cmd := copyOf("node", syscall.CLONE_NEWPID|syscall.CLONE_NEWNS|syscall.CLONE_NEWNET)
	cmd.Env = append(cmd.Env, nodeVariable+"="+n.Dir)
	cmd.Stdout = w
	n.init = n.spawn(t, "init", cmd)
	w.Close()
	if err := r.SetReadDeadline(time.Now().Add(patience)); err != nil {
		t.Fatal(err)
	}
	if line, err := bufio.NewReader(r).ReadString('\n'); err != nil || line != "ready\n" {
		t.Fatalf("%s: %q, %v", n.Name, line, err)
	}
	link, pid, at := n.link(), strconv.Itoa(n.init.cmd.Process.Pid), n.Address.String()
	ip(t, "link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", pid)
	ip(t, "link", "set", link, "master", bridge, "up")
	ip(t, "route", "replace", podNetwork(n.number), "via", at)
	for _, args := range [][]string{
		{"ip", "addr", "add", at + "/24", "dev", "eth0"},
		{"ip", "link", "set", "eth0", "up"},
		{"ip", "route", "add", "default", "via", controlAddress.String()},
		{"sh", "-c", "echo 1 >/proc/sys/net/ipv4/ip_forward"},
	} {
		if out, err := n.Command(t.Context(), args...).CombinedOutput(); err != nil {
			t.Fatalf("%s: %v: %v: %s", n.Name, args, err, out)
		}
	}
	for _, other := range []int{1, 2} {
		if other != n.number {
			via := netip.AddrFrom4([4]byte{192, 168, 77, byte(other)})
			if out, err := n.Command(t.Context(), "ip", "route", "add", podNetwork(other), "via", via.String()).CombinedOutput(); err != nil {
				t.Fatalf("%s: %v: %s", n.Name, err, out)
			}
		}
	}
	n.start(t, "containerd", "containerd", "-c", n.file("containerd.toml"))
	n.waitFor(t, "containerd", func(ctx context.Context) error { return n.Command(ctx, "ctr", "version").Run() })
	n.StartKubelet(t)
	n.start(t, "kube-proxy", n.binary, "kube-proxy", "--config="+n.file("proxy.yaml"))
}

// serveNode is the first process of a node's namespaces: it readies them and waits for all that lost its parent.
func serveNode(dir string) error {
	if err := ready(); err != nil {
		return err
	}
	for _, m := range []struct{ from, to string }{{"kubelet", "/var/lib/kubelet"}, {"leases", "/var/lib/cni"}, {"log", "/var/log"}} {
		if err := os.MkdirAll(m.to, 0o755); err != nil {
			return err
		}
		if err := unix.Mount(filepath.Join(dir, m.from), m.to, "", unix.MS_BIND, ""); err != nil {
			return fmt.Errorf("mounting %s: %w", m.to, err)
		}
	}
	fmt.Println("ready")
	reap(0)
	return nil
}

// Command is a command that runs on the node, as root.
func (n *Node) Command(ctx context.Context, args ...string) *exec.Cmd {
	enter := []string{"--target", strconv.Itoa(n.init.cmd.Process.Pid), "--pid", "--mount", "--net", "--", "setpriv", "--pdeathsig", "KILL"}
	return exec.CommandContext(ctx, "nsenter", append(enter, args...)...)
}

// start runs one part of the node until it is killed, with its output in a log.
func (n *Node) start(t testing.TB, part string, args ...string) {
	t.Helper()
	log, err := os.OpenFile(n.file(part+".log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()                               // the child has its own
	cmd := n.Command(context.Background(), args...) // it may outlive the part of the test that started it
	cmd.Stdout, cmd.Stderr = log, log
	n.parts[part] = n.spawn(t, part, cmd)
}

// spawn starts a process and waits for it. No thread of this program may end while it runs, since that which started a
// process takes it along: none does that a goroutine has not locked.
func (n *Node) spawn(t testing.TB, what string, cmd *exec.Cmd) *process {
	t.Helper()
	if err := cmd.Start(); err != nil {
		t.Fatalf("%s: %s: %v", n.Name, what, err)
	}
	p := &process{cmd: cmd, ended: make(chan struct{})}
	go func() { // ends with the process, which Stop ends
		_ = cmd.Wait()
		close(p.ended)
	}()
	return p
}

// waitFor waits until a part of the node answers.
func (n *Node) waitFor(t testing.TB, part string, ask func(context.Context) error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	for {
		err := ask(ctx)
		if err == nil {
			return
		}
		select {
		case <-n.parts[part].ended:
			t.Fatalf("%s: %s ended:\n%s", n.Name, part, n.tail(part))
		case <-ctx.Done():
			t.Fatalf("%s: %s does not answer: %v\n%s", n.Name, part, err, n.tail(part))
		case <-time.After(100 * time.Millisecond):
		}
	}
}

// tail is the end of a part's log.
func (n *Node) tail(part string) []byte {
	data, err := os.ReadFile(n.file(part + ".log"))
	if err != nil {
		return nil
	}
	return data[max(0, len(data)-4096):]
}

// KillKubelet kills kubelet as a crash would; all else goes on.
func (n *Node) KillKubelet() { n.parts["kubelet"].kill() }

// StartKubelet starts kubelet, at first and after KillKubelet.
func (n *Node) StartKubelet(t testing.TB) {
	t.Helper()
	n.start(t, "kubelet", n.binary, "kubelet", "--config="+n.file("kubelet.yaml"), "--kubeconfig="+n.kubeconfig(n.Name),
		"--hostname-override="+n.Name, "--node-ip="+n.Address.String())
}

// Crash ends everything that runs on the node at once, as the loss of its power would: what was in memory, /run included,
// is gone, and what was on its disk stays.
func (n *Node) Crash() {
	all := []*process{n.init}
	for _, p := range n.parts {
		all = append(all, p)
	}
	// All are killed before one is waited for: nsenter(1) stops with what it has started, and while it does not wait for that
	// its namespace does not end.
	for _, p := range all {
		_ = p.cmd.Process.Kill()
	}
	for _, p := range all {
		<-p.ended
	}
	n.init, n.parts = nil, make(map[string]*process)
	_ = exec.Command("ip", "link", "del", n.link()).Run() // the kernel does it as well, in its own time
}

// link is the control plane's end of the node's cable.
func (n *Node) link() string { return "to-" + n.Name }

// Stop ends the node for good.
func (n *Node) Stop() {
	n.cleanup.Do(func() {
		if n.init != nil {
			n.Crash()
		}
		if n.t.Failed() {
			for _, part := range []string{"kubelet", "containerd"} {
				n.t.Logf("the end of %s's log on %s:\n%s", part, n.Name, n.tail(part))
			}
		}
	})
}

// Volume makes a folder on the node's disk and returns the YAML of a PersistentVolume that is this folder.
func (n *Node) Volume(t testing.TB, name string) string {
	t.Helper()
	dir := n.file("volumes/" + name)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	return fmt.Sprintf(`
apiVersion: v1
kind: PersistentVolume
metadata: {name: %s-%s}
spec:
  capacity: {storage: 10Gi}
  accessModes: [ReadWriteOnce]
  persistentVolumeReclaimPolicy: Retain
  local: {path: %q}
  nodeAffinity: {required: {nodeSelectorTerms: [{matchExpressions: [{key: kubernetes.io/hostname, operator: In, values: [%s]}]}]}}
`, n.Name, name, dir, n.Name)
}

// Import puts images into the node's containerd, from an archive of Docker's or of OCI.
func (n *Node) Import(ctx context.Context, archive string) error {
	if out, err := n.Command(ctx, "ctr", "-n", "k8s.io", "images", "import", archive).CombinedOutput(); err != nil {
		return fmt.Errorf("%s: importing %s: %w: %s", n.Name, filepath.Base(archive), err, out)
	}
	return nil
}

// Root is the root of the node's files, /run for instance, as seen from here.
func (n *Node) Root() string {
	return filepath.Join("/proc", strconv.Itoa(n.init.cmd.Process.Pid), "root")
}

// Processes are the numbers, from here, of those on the node that run a program of this name.
func (n *Node) Processes(program string) ([]int, error) {
	return n.processes(func(name string) bool { return name == program[:min(len(program), 15)] })
}

// processes are those whose program's name is asked for: what its first process has below it, and its parts.
func (n *Node) processes(wanted func(name string) bool) ([]int, error) {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil, err
	}
	parents, named := make(map[int]int), []int(nil)
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		stat, err := os.ReadFile(filepath.Join("/proc", e.Name(), "stat"))
		if err != nil {
			continue // it has ended
		}
		// proc_pid_stat(5): PID (NAME) STATE PARENT ..., and the name may hold anything, of 15 bytes.
		end := bytes.LastIndexByte(stat, ')')
		_, name, ok := strings.Cut(string(stat[:max(0, end)]), "(")
		fields := strings.Fields(string(stat[end+1:]))
		if !ok || len(fields) < 2 || fields[0] == "Z" {
			continue
		}
		if parents[pid], err = strconv.Atoi(fields[1]); err != nil {
			return nil, err
		}
		if wanted(name) {
			named = append(named, pid)
		}
	}
	own := []int{n.init.cmd.Process.Pid}
	for _, p := range n.parts {
		own = append(own, p.cmd.Process.Pid)
	}
	return slices.DeleteFunc(named, func(pid int) bool {
		for pid > 1 && !slices.Contains(own, pid) {
			pid = parents[pid]
		}
		return pid <= 1
	}), nil
}
