package kube

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"time"
	"unique"
)

// Resource is a kind of object that is read here.
type Resource string

// What can be read. Of ServiceAccounts, Nodes, Namespaces and DaemonSets only the metadata is asked for.
const (
	Pods                Resource = "pods"
	ServiceAccounts     Resource = "serviceaccounts"
	Nodes               Resource = "nodes"
	Namespaces          Resource = "namespaces"
	ConfigMaps          Resource = "configmaps"
	ClusterTrustBundles Resource = "clustertrustbundles" // of certificates.k8s.io/v1: Kubernetes 1.37 and later
	DaemonSets          Resource = "daemonsets"          // of AppsGroup
)

// API groups.
const (
	CertificatesGroup = "certificates.k8s.io" // of ClusterTrustBundles and of their signers
	AppsGroup         = "apps"                // of DaemonSets
)

// maxObject bounds one object in an answer, in bytes. etcd keeps up to 1.5 MiB in a shorter encoding.
const maxObject = 8 << 20

// Object is what is kept of an object: everything else is dropped while it is read.
type Object struct {
	Namespace, Name, UID string
	ResourceVersion      string
	Created              time.Time         // whole seconds
	DeleteAt             time.Time         // deletionTimestamp; zero while it is not being deleted
	NodeName             string            // of a pod
	ServiceAccount       string            // of a pod
	Phase                string            // of a pod
	DaemonSet            string            // of a pod: UID of the DaemonSet that controls it; empty where none does
	Labels, Annotations  map[string]string // ours alone: those whose name begins with OurPrefix
	Data                 map[string]string // of a ConfigMap, binary data (in base64) included
	Digest               [32]byte          // of Data, where a watch keeps that alone
	Immutable            bool              // a ConfigMap whose data can never be changed again
	Signer, TrustBundle  string            // of a ClusterTrustBundle
}

// OurPrefix is how the names of our labels and annotations begin.
const OurPrefix = "signet.dev/"

// ours is what is ours of an object's labels or annotations: there may be many others, and large ones.
type ours map[string]string

// UnmarshalJSON implements json.Unmarshaler.
func (o *ours) UnmarshalJSON(data []byte) error {
	if !bytes.Contains(data, []byte(OurPrefix)) {
		return nil
	}
	var all map[string]string
	if err := json.Unmarshal(data, &all); err != nil {
		return err
	}
	maps.DeleteFunc(all, func(k, _ string) bool { return !strings.HasPrefix(k, OurPrefix) })
	*o = all
	return nil
}

// Digest is that of a ConfigMap's data: no two have the same.
func Digest(data map[string]string) [32]byte {
	h := sha256.New()
	var size [8]byte
	for _, k := range slices.Sorted(maps.Keys(data)) {
		for _, s := range []string{k, data[k]} {
			binary.BigEndian.PutUint64(size[:], uint64(len(s)))
			h.Write(size[:])
			io.WriteString(h, s)
		}
	}
	return [32]byte(h.Sum(nil))
}

// wireObject is the part of an object's JSON that is read.
type wireObject struct {
	Metadata struct {
		Namespace         string    `json:"namespace"`
		Name              string    `json:"name"`
		UID               string    `json:"uid"`
		ResourceVersion   string    `json:"resourceVersion"`
		CreationTimestamp time.Time `json:"creationTimestamp"`
		DeletionTimestamp time.Time `json:"deletionTimestamp"`
		Labels            ours      `json:"labels"`
		Annotations       ours      `json:"annotations"`
		OwnerReferences   owners    `json:"ownerReferences"`
	} `json:"metadata"`
	Spec struct {
		NodeName           string `json:"nodeName"`
		ServiceAccountName string `json:"serviceAccountName"`
		SignerName         string `json:"signerName"`
		TrustBundle        string `json:"trustBundle"`
	} `json:"spec"`
	Status struct {
		Phase string `json:"phase"`
	} `json:"status"`
	Data       map[string]string `json:"data"`
	BinaryData map[string]string `json:"binaryData"`
	Immutable  bool              `json:"immutable"`
}

// owners are those of an object, as it says.
type owners []struct {
	APIVersion string `json:"apiVersion"`
	Kind       string `json:"kind"`
	UID        string `json:"uid"`
	Controller bool   `json:"controller"`
}

// daemonSet is the UID of the DaemonSet that controls the object. An object has one controller at most, or none counts.
func (o owners) daemonSet() string {
	uid, controllers := "", 0
	for _, r := range o {
		if !r.Controller {
			continue
		}
		controllers++
		if group, _, ok := strings.Cut(r.APIVersion, "/"); ok && group == AppsGroup && r.Kind == "DaemonSet" {
			uid = r.UID
		}
	}
	if controllers != 1 {
		return ""
	}
	return uid
}

// object reduces w. What thousands of objects have in common is kept once.
func (w wireObject) object() Object {
	one := func(s string) string { return unique.Make(s).Value() }
	if len(w.BinaryData) > 0 { // a name is in one of both only
		if w.Data == nil {
			w.Data = map[string]string{}
		}
		maps.Copy(w.Data, w.BinaryData)
	}
	return Object{
		Namespace: one(w.Metadata.Namespace), Name: w.Metadata.Name, UID: w.Metadata.UID, ResourceVersion: w.Metadata.ResourceVersion,
		Created: w.Metadata.CreationTimestamp, DeleteAt: w.Metadata.DeletionTimestamp,
		NodeName: one(w.Spec.NodeName), ServiceAccount: one(w.Spec.ServiceAccountName), Phase: one(w.Status.Phase), DaemonSet: one(w.Metadata.OwnerReferences.daemonSet()), Data: w.Data,
		Labels: w.Metadata.Labels, Annotations: w.Metadata.Annotations, Immutable: w.Immutable, Signer: w.Spec.SignerName, TrustBundle: w.Spec.TrustBundle,
	}
}

// path of a collection, or of one object where there is a name. Namespaces and names may be a caller's claim.
func (r Resource) path(namespace, name string) string {
	p := "/api/v1"
	switch r {
	case ClusterTrustBundles:
		p = "/apis/" + CertificatesGroup + "/v1"
	case DaemonSets:
		p = "/apis/" + AppsGroup + "/v1"
	}
	if namespace != "" {
		p += "/namespaces/" + url.PathEscape(namespace)
	}
	p += "/" + string(r)
	if name != "" {
		p += "/" + url.PathEscape(name)
	}
	return p
}

// metadataList asks for the metadata of a list's objects alone.
const metadataList = "application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1"

// accept asks for the metadata alone where nothing else is needed.
func (r Resource) accept(list bool) string {
	switch {
	case r != ServiceAccounts && r != Nodes && r != Namespaces && r != DaemonSets:
		return "application/json"
	case list:
		return metadataList
	}
	return "application/json;as=PartialObjectMetadata;g=meta.k8s.io;v=v1"
}

// Get reads one object, as it is now and not from a cache; ErrNotFound where there is none.
func (c *Client) Get(ctx context.Context, r Resource, namespace, name string) (Object, error) {
	if name == "" || name == "." || name == ".." || namespace == "." || namespace == ".." { // no path may leave its collection
		return Object{}, ErrNotFound
	}
	ctx, cancel := context.WithTimeout(ctx, c.timeout)
	defer cancel()
	resp, err := c.do(ctx, http.MethodGet, r.path(namespace, name), nil, r.accept(false), nil)
	if err != nil {
		return Object{}, err
	}
	return readObject(resp)
}

func readObject(resp *http.Response) (Object, error) {
	defer resp.Body.Close()
	data, err := io.ReadAll(io.LimitReader(resp.Body, maxObject+1))
	if err != nil {
		return Object{}, fmt.Errorf("the API server's answer broke off: %w", err)
	}
	if len(data) > maxObject {
		return Object{}, fmt.Errorf("the API server's answer is above %d bytes", maxObject)
	}
	var w wireObject
	if err := json.Unmarshal(data, &w); err != nil {
		return Object{}, fmt.Errorf("the API server's answer does not parse: %w", err)
	}
	if w.Metadata.UID == "" || w.Metadata.Name == "" {
		return Object{}, errors.New("the API server's answer is not an object")
	}
	return w.object(), nil
}

// do sends one request whose answer is read by the caller, who bounds it and its time. Anything but success is an error.
func (c *Client) do(ctx context.Context, method, path string, query url.Values, accept string, body []byte) (*http.Response, error) {
	if err := c.pace.Wait(ctx); err != nil {
		return nil, err
	}
	u := c.base + path
	if len(query) > 0 {
		u += "?" + query.Encode()
	}
	r, err := http.NewRequestWithContext(context.WithValue(ctx, streamed{}, true), method, u, bytes.NewReader(body))
	if err != nil {
		return nil, err
	}
	r.Header.Set("Accept", accept)
	if body != nil {
		r.Header.Set("Content-Type", "application/json")
	}
	resp, err := c.stream.Do(r)
	if err != nil {
		return nil, err
	}
	if resp.StatusCode/100 == 2 {
		return resp, nil
	}
	defer resp.Body.Close()
	return nil, failure(resp)
}
