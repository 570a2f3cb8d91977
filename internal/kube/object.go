package kube

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"time"
	"unique"
)

// Resource is a kind of object of the core API that is read here.
type Resource string

// What can be read. Of ServiceAccounts and Nodes only the metadata is asked for.
const (
	Pods            Resource = "pods"
	ServiceAccounts Resource = "serviceaccounts"
	Nodes           Resource = "nodes"
	ConfigMaps      Resource = "configmaps"
)

// maxObject bounds one object in an answer, in bytes. etcd keeps up to 1.5 MiB in a shorter encoding.
const maxObject = 8 << 20

// Object is what is kept of an object: everything else is dropped while it is read.
type Object struct {
	Namespace, Name, UID string
	ResourceVersion      string
	Created              time.Time // whole seconds
	DeleteAt             time.Time // deletionTimestamp; zero while it is not being deleted
	NodeName             string    // of a pod
	ServiceAccount       string    // of a pod
	Phase                string    // of a pod
	Data                 map[string]string
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
	} `json:"metadata"`
	Spec struct {
		NodeName           string `json:"nodeName"`
		ServiceAccountName string `json:"serviceAccountName"`
	} `json:"spec"`
	Status struct {
		Phase string `json:"phase"`
	} `json:"status"`
	Data map[string]string `json:"data"`
}

// object reduces w. What thousands of objects have in common is kept once.
func (w wireObject) object() Object {
	one := func(s string) string { return unique.Make(s).Value() }
	return Object{
		Namespace: one(w.Metadata.Namespace), Name: w.Metadata.Name, UID: w.Metadata.UID, ResourceVersion: w.Metadata.ResourceVersion,
		Created: w.Metadata.CreationTimestamp, DeleteAt: w.Metadata.DeletionTimestamp,
		NodeName: one(w.Spec.NodeName), ServiceAccount: one(w.Spec.ServiceAccountName), Phase: one(w.Status.Phase), Data: w.Data,
	}
}

// Errors of single requests.
var (
	// ErrNotFound: there is no such object.
	ErrNotFound = errors.New("there is no such object")
	// ErrConflict: the object was changed, made or deleted meanwhile; nothing was written.
	ErrConflict = errors.New("the object was changed meanwhile")
	// errExpired: the version that a list or a watch began from is no longer kept (410 Gone).
	errExpired = errors.New("the API server no longer keeps that version")
)

// path of a collection, or of one object where there is a name. Namespaces and names may be a caller's claim.
func (r Resource) path(namespace, name string) string {
	p := "/api/v1"
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
	case r != ServiceAccounts && r != Nodes:
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

// ConfigMap is what is written of one.
type ConfigMap struct {
	Namespace, Name string
	ResourceVersion string // of the one that is replaced; empty: there is none yet
	Labels          map[string]string
	Annotations     map[string]string
	Data            map[string]string
}

// WriteConfigMap replaces a ConfigMap as a whole if it still has that version, or makes it; ErrConflict where it has
// another, is gone, or is there already.
func (c *Client) WriteConfigMap(ctx context.Context, m ConfigMap) (Object, error) {
	metadata := map[string]any{"name": m.Name, "namespace": m.Namespace}
	for k, v := range map[string]map[string]string{"labels": m.Labels, "annotations": m.Annotations} {
		if len(v) > 0 {
			metadata[k] = v
		}
	}
	method, path := http.MethodPost, ConfigMaps.path(m.Namespace, "")
	if m.ResourceVersion != "" {
		method, path = http.MethodPut, ConfigMaps.path(m.Namespace, m.Name)
		metadata["resourceVersion"] = m.ResourceVersion
	}
	body, err := json.Marshal(map[string]any{"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": m.Data})
	if err != nil {
		return Object{}, err
	}
	ctx, cancel := context.WithTimeout(ctx, c.timeout)
	defer cancel()
	resp, err := c.do(ctx, method, path, nil, "application/json", body)
	if errors.Is(err, ErrNotFound) && m.ResourceVersion != "" {
		err = fmt.Errorf("%w: %w", ErrConflict, err)
	}
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

// status is an error as the API server writes it.
type status struct {
	Code    int    `json:"code"`
	Reason  string `json:"reason"`
	Message string `json:"message"`
}

func failure(resp *http.Response) error {
	var s status
	data, err := io.ReadAll(io.LimitReader(resp.Body, 64<<10))
	if err != nil || json.Unmarshal(data, &s) != nil {
		s = status{} // the status line says enough
	}
	s.Code = resp.StatusCode
	return s.err()
}

func (s status) err() error {
	err := fmt.Errorf("the API server answered with status %d: %.200s", s.Code, s.Message)
	switch s.Code {
	case http.StatusNotFound:
		return fmt.Errorf("%w: %w", ErrNotFound, err)
	case http.StatusConflict:
		return fmt.Errorf("%w: %w", ErrConflict, err)
	case http.StatusForbidden:
		return fmt.Errorf("%w: %w", ErrForbidden, err)
	case http.StatusGone:
		return fmt.Errorf("%w: %w", errExpired, err)
	}
	return err
}
