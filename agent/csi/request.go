package csi

import (
	"bytes"
	"encoding/json"
	"io"
	"path/filepath"
	"strings"
	"time"

	csipb "github.com/container-storage-interface/spec/lib/go/csi"

	"github.com/signet-ca/signet/api"
)

// What kubelet writes into a call (k8s.io/kubernetes/pkg/volume/csi; the CSI documentation of Kubernetes, "Pod Info").
const (
	ownPrefix    = "csi.storage.k8s.io/" // kubelet's own keys
	keyEphemeral = ownPrefix + "ephemeral"
	keyPodName   = ownPrefix + "pod.name"
	keyNamespace = ownPrefix + "pod.namespace"
	keyPodUID    = ownPrefix + "pod.uid"
	keyAccount   = ownPrefix + "serviceAccount.name"
	keyTokens    = ownPrefix + "serviceAccount.tokens"
)

// Bounds of what a call may hold.
const (
	maxAttributes = 64
	maxAudiences  = 8
	maxTokens     = maxAudiences * (api.MaxTokenBytes + 1<<10)
	maxPath       = 4096
)

// target is a place for a volume below kubelet's folder of pods: UID/volumes/kubernetes.io~csi/NAME/mount.
type target struct{ podUID, name string }

// Names of folders below that of a pod.
const (
	csiFolder   = "volumes/kubernetes.io~csi"
	mountFolder = "mount"
	volumeData  = "vol_data.json" // kubelet's own notes, beside mount
)

// parent is the volume's folder, relative to the folder of pods; kubelet made it, and mount is inside.
func (t target) parent() string { return t.podUID + "/" + csiFolder + "/" + t.name }

// request is a NodePublishVolume call that is well formed.
type request struct {
	Volume
	target target
	token  []byte
}

// parsePublish checks all of a call that can be checked without looking at the file system or into the token.
func (d *Driver) parsePublish(r *csipb.NodePublishVolumeRequest) (request, error) {
	t, err := d.parseTarget(r.GetVolumeId(), r.GetTargetPath())
	if err != nil {
		return request{}, err
	}
	if err := checkVolume(r); err != nil {
		return request{}, err
	}
	attributes := r.GetVolumeContext()
	pod, err := parsePod(attributes)
	if err != nil {
		return request{}, err
	}
	if pod.UID != t.podUID {
		return request{}, api.E(api.VolumeTarget, "the volume's folder is that of another pod")
	}
	tokens, err := d.findTokens(attributes, r.GetSecrets())
	if err != nil {
		return request{}, err
	}
	token, err := parseTokens(tokens, d.cfg.Audience)
	if err != nil {
		return request{}, err
	}
	return request{Volume{ID: r.GetVolumeId(), Name: t.name, Pod: pod}, t, token}, nil
}

// parseTarget checks what both calls have: the volume's id, and that its path is one that kubelet makes.
func (d *Driver) parseTarget(id, path string) (target, error) {
	if !isVolumeID(id) {
		return target{}, api.E(api.VolumeRefused, "the volume's id is not that of an inline volume")
	}
	rest, ok := strings.CutPrefix(path, d.cfg.KubeletDir+"/pods/")
	if !ok || len(path) > maxPath {
		return target{}, api.E(api.VolumeTarget, "the volume is not below the folder that this agent knows as kubelet's")
	}
	var t target
	if t.podUID, rest, ok = strings.Cut(rest, "/"); ok {
		if rest, ok = strings.CutPrefix(rest, csiFolder+"/"); ok {
			t.name, ok = strings.CutSuffix(rest, "/"+mountFolder)
		}
	}
	if !ok || !api.IsUID(t.podUID) || !api.IsLabel(t.name) {
		return target{}, api.E(api.VolumeTarget, "the volume's path is not one that kubelet makes")
	}
	return t, nil
}

// path is the inverse of parseTarget.
func (d *Driver) path(t target) string {
	return filepath.Join(d.cfg.KubeletDir, "pods", t.parent(), mountFolder)
}

// checkVolume refuses whatever the pod's author may ask for beyond a plain, read-only, inline volume.
func checkVolume(r *csipb.NodePublishVolumeRequest) error {
	m := r.GetVolumeCapability().GetMount()
	switch {
	case r.GetVolumeContext()[keyEphemeral] != "true":
		return api.E(api.VolumeRefused, "the volume is not an inline one of its pod, or the CSIDriver object lacks podInfoOnMount")
	case !r.GetReadonly():
		return api.E(api.VolumeRefused, "the volume is not readOnly, so the pod could replace its socket")
	case m == nil:
		return api.E(api.VolumeRefused, "the volume is not a folder")
	case m.GetFsType() != "" || len(m.GetMountFlags()) > 0 || m.GetVolumeMountGroup() != "":
		return api.E(api.VolumeRefused, "the volume asks for a file system, mount options or a group")
	case len(r.GetPublishContext()) > 0 || r.GetStagingTargetPath() != "":
		return api.E(api.VolumeRefused, "the volume was attached or staged, which this driver has no part in")
	}
	switch r.GetVolumeCapability().GetAccessMode().GetMode() {
	case csipb.VolumeCapability_AccessMode_SINGLE_NODE_WRITER, csipb.VolumeCapability_AccessMode_SINGLE_NODE_READER_ONLY,
		csipb.VolumeCapability_AccessMode_SINGLE_NODE_SINGLE_WRITER, csipb.VolumeCapability_AccessMode_SINGLE_NODE_MULTI_WRITER:
		return nil
	}
	return api.E(api.VolumeRefused, "the volume is for more than one node")
}

// parsePod reads whose the volume is. kubelet writes its own keys over those of the pod's author, so they can be taken for
// its word; any other key is the author's.
func parsePod(attributes map[string]string) (Pod, error) {
	if len(attributes) > maxAttributes {
		return Pod{}, api.E(api.VolumeRefused, "the volume has too many attributes")
	}
	for key := range attributes {
		if !strings.HasPrefix(key, ownPrefix) {
			return Pod{}, api.E(api.VolumeRefused, "the volume has attributes (volumeAttributes), and there are none")
		}
	}
	p := Pod{attributes[keyPodUID], attributes[keyNamespace], attributes[keyPodName], attributes[keyAccount]}
	if !api.IsUID(p.UID) || !api.IsLabel(p.Namespace) || !api.IsSubdomain(p.Name) || !api.IsSubdomain(p.ServiceAccount) {
		return Pod{}, api.E(api.VolumeRefused, "kubelet does not say which pod the volume is for: the CSIDriver object needs podInfoOnMount")
	}
	return p, nil
}

// findTokens returns the one value that kubelet wrote. A value in the other place, or a secret beside it, comes from the
// pod's author.
func (d *Driver) findTokens(attributes, secrets map[string]string) (string, error) {
	_, public := attributes[keyTokens]
	allowed := 0
	from := attributes
	if d.cfg.TokenIn == InSecrets {
		if public {
			return "", api.E(api.VolumeRefused,
				"a token came as an attribute of the volume: the pod's author put it there, or the CSIDriver object lacks serviceAccountTokenInSecrets")
		}
		from = secrets
		if _, ok := secrets[keyTokens]; ok {
			allowed = 1
		}
	}
	if len(secrets) > allowed {
		return "", api.E(api.VolumeRefused, "the volume brings a secret (nodePublishSecretRef), and none is taken")
	}
	tokens := from[keyTokens]
	switch {
	case tokens == "":
		return "", api.E(api.TokenMissing, "kubelet sent no token: the CSIDriver object needs tokenRequests with the audience of this trust domain")
	case len(tokens) > maxTokens:
		return "", api.E(api.TokenTooLarge, "the tokens that kubelet sent are too large")
	}
	return tokens, nil
}

// parseTokens returns the token for one audience out of {AUDIENCE: {"token": ..., "expirationTimestamp": ...}}. It takes
// nothing else: a name that comes twice, another spelling or more members could mean two things to two readers.
func parseTokens(s, audience string) ([]byte, error) {
	dec := json.NewDecoder(strings.NewReader(s))
	malformed := api.E(api.TokenMalformed, "what kubelet sent as tokens is malformed")
	if !opens(dec) {
		return nil, malformed
	}
	seen := map[string]bool{}
	var ours []byte
	for dec.More() {
		name, ok := key(dec)
		if !ok {
			return nil, malformed
		}
		if seen[name] {
			return nil, api.E(api.TokenAmbiguous, "kubelet sent two tokens for one audience")
		}
		if seen[name] = true; len(seen) > maxAudiences {
			return nil, api.E(api.TokenMalformed, "kubelet sent tokens for too many audiences")
		}
		token, ok := parseToken(dec)
		if !ok {
			return nil, malformed
		}
		if name == audience {
			ours = []byte(token)
		}
	}
	if _, err := dec.Token(); err != nil {
		return nil, malformed
	}
	if _, err := dec.Token(); err != io.EOF {
		return nil, malformed
	}
	switch {
	case ours == nil:
		return nil, api.E(api.TokenAudience, "kubelet sent no token for the audience of this trust domain: compare tokenRequests of the CSIDriver object")
	case len(ours) > api.MaxTokenBytes:
		return nil, api.E(api.TokenTooLarge, "the token is too large")
	case len(ours) == 0 || bytes.ContainsFunc(ours, func(r rune) bool { return r <= ' ' || r > '~' }):
		return nil, malformed
	}
	return ours, nil
}

// parseToken reads one {"token": ..., "expirationTimestamp": ...}.
func parseToken(dec *json.Decoder) (token string, ok bool) {
	if !opens(dec) {
		return "", false
	}
	values := map[string]string{}
	for dec.More() {
		name, ok := key(dec)
		if _, twice := values[name]; !ok || twice || name != "token" && name != "expirationTimestamp" {
			return "", false
		}
		if values[name], ok = key(dec); !ok {
			return "", false
		}
	}
	if _, err := dec.Token(); err != nil || len(values) != 2 {
		return "", false
	}
	if _, err := time.Parse(time.RFC3339, values["expirationTimestamp"]); err != nil {
		return "", false
	}
	return values["token"], true
}

func opens(dec *json.Decoder) bool {
	t, err := dec.Token()
	return err == nil && t == json.Delim('{')
}

// key reads a string.
func key(dec *json.Decoder) (string, bool) {
	t, err := dec.Token()
	s, ok := t.(string)
	return s, err == nil && ok
}

// isVolumeID reports whether s is the id that kubelet makes for an inline volume: "csi-" and a SHA-256 in hex.
func isVolumeID(s string) bool {
	digits, ok := strings.CutPrefix(s, "csi-")
	return ok && len(digits) == 64 && strings.Trim(digits, "0123456789abcdef") == ""
}
