package kube

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
)

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
	return c.write(ctx, ConfigMaps, m.Namespace, m.Name, m.ResourceVersion, map[string]any{
		"apiVersion": "v1", "kind": "ConfigMap", "data": m.Data,
		"metadata": metadata(m.Namespace, m.Name, m.ResourceVersion, m.Labels, m.Annotations),
	})
}

// TrustBundle is what is written of a ClusterTrustBundle.
type TrustBundle struct {
	Name            string // begins with the signer, its slash a colon, and another colon
	ResourceVersion string // of the one that is replaced; empty: there is none yet
	Labels          map[string]string
	Annotations     map[string]string
	Signer          string
	PEM             string // at least one certificate, each an authority
}

// WriteTrustBundle does for a ClusterTrustBundle what WriteConfigMap does. ErrNotFound: the API server knows no such kind
// of object.
func (c *Client) WriteTrustBundle(ctx context.Context, b TrustBundle) (Object, error) {
	return c.write(ctx, ClusterTrustBundles, "", b.Name, b.ResourceVersion, map[string]any{
		"apiVersion": CertificatesGroup + "/v1", "kind": "ClusterTrustBundle",
		"metadata": metadata("", b.Name, b.ResourceVersion, b.Labels, b.Annotations),
		"spec":     map[string]string{"signerName": b.Signer, "trustBundle": b.PEM},
	})
}

func metadata(namespace, name, version string, labels, annotations map[string]string) map[string]any {
	m := map[string]any{"name": name}
	for k, v := range map[string]string{"namespace": namespace, "resourceVersion": version} {
		if v != "" {
			m[k] = v
		}
	}
	for k, v := range map[string]map[string]string{"labels": labels, "annotations": annotations} {
		if len(v) > 0 {
			m[k] = v
		}
	}
	return m
}

// write makes an object, or replaces the one of that version.
func (c *Client) write(ctx context.Context, r Resource, namespace, name, version string, object map[string]any) (Object, error) {
	method, path := http.MethodPost, r.path(namespace, "")
	if version != "" {
		method, path = http.MethodPut, r.path(namespace, name)
	}
	body, err := json.Marshal(object)
	if err != nil {
		return Object{}, err
	}
	ctx, cancel := context.WithTimeout(ctx, c.timeout)
	defer cancel()
	resp, err := c.do(ctx, method, path, nil, "application/json", body)
	if errors.Is(err, ErrNotFound) && version != "" {
		err = fmt.Errorf("%w: %w", ErrConflict, err)
	}
	if err != nil {
		return Object{}, err
	}
	return readObject(resp)
}

// Delete deletes an object if it is still that one in that version: ErrConflict where it is not, ErrNotFound where there
// is none.
func (c *Client) Delete(ctx context.Context, r Resource, o Object) error {
	body, err := json.Marshal(map[string]any{
		"apiVersion": "v1", "kind": "DeleteOptions", "preconditions": map[string]string{"uid": o.UID, "resourceVersion": o.ResourceVersion},
	})
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, c.timeout)
	defer cancel()
	resp, err := c.do(ctx, http.MethodDelete, r.path(o.Namespace, o.Name), nil, "application/json", body)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	_, err = io.Copy(io.Discard, io.LimitReader(resp.Body, maxObject)) // so that the connection is used again
	return err
}
