package kube

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strconv"
	"time"
)

// Bounds of a list.
const (
	pageSize   = 500
	pageTime   = time.Minute // for one page
	maxObjects = 1 << 20     // in a whole list
)

// listMeta is the metadata of a list.
type listMeta struct {
	ResourceVersion string `json:"resourceVersion"`
	Continue        string `json:"continue"`
}

// list reads a collection page by page and returns its objects and the version that they all are of. An object is reduced
// as it is read, so a page of large ones costs no more memory than the largest.
func (c *Client) list(ctx context.Context, w WatchConfig) ([]Object, string, error) {
	var all []Object
	r := w.Resource
	query := url.Values{"limit": {strconv.Itoa(pageSize)}}
	w.selectors(query)
	for version := ""; ; {
		meta, err := c.page(ctx, r, w.Namespace, query, func(o Object) error {
			if len(all) == maxObjects {
				return fmt.Errorf("there are more than %d %s", maxObjects, r)
			}
			all = append(all, w.reduce(o))
			return nil
		})
		if err != nil {
			return nil, "", err
		}
		if meta.ResourceVersion == "" || version != "" && version != meta.ResourceVersion {
			return nil, "", errors.New("the pages of the list are not of one version")
		}
		version = meta.ResourceVersion
		if meta.Continue == "" {
			return all, version, nil
		}
		query.Set("continue", meta.Continue)
	}
}

// page reads one page of a list and hands over each object.
func (c *Client) page(ctx context.Context, r Resource, namespace string, query url.Values, each func(Object) error) (listMeta, error) {
	ctx, cancel := context.WithTimeout(ctx, pageTime)
	defer cancel()
	resp, err := c.do(ctx, http.MethodGet, r.path(namespace, ""), query, r.accept(true), nil)
	if err != nil {
		return listMeta{}, err
	}
	defer resp.Body.Close()
	meta, err := readList(resp.Body, each)
	if err != nil {
		return listMeta{}, fmt.Errorf("the API server's list of %s: %w", r, err)
	}
	return meta, nil
}

// readList reads the JSON of a list of objects.
func readList(body io.Reader, each func(Object) error) (listMeta, error) {
	meta, _, err := readItems(body, func(w wireObject) error {
		if w.Metadata.UID == "" || w.Metadata.Name == "" {
			return errors.New("an item is not an object")
		}
		return each(w.object())
	})
	return meta, err
}

// readItems reads the JSON of a list: an object whose fields come in any order. It reports whether there were items, if only
// null.
func readItems[T any](body io.Reader, each func(T) error) (meta listMeta, listed bool, err error) {
	in := &capped{r: body}
	dec := json.NewDecoder(in)
	in.next()
	if err := expect(dec, '{'); err != nil {
		return meta, false, err
	}
	for dec.More() {
		in.next()
		key, err := dec.Token()
		if err != nil {
			return meta, listed, err
		}
		switch key {
		case "metadata":
			err = dec.Decode(&meta)
		case "items":
			listed = true
			err = eachItem(dec, in, each)
		default:
			err = dec.Decode(new(json.RawMessage))
		}
		if err != nil {
			return meta, listed, err
		}
	}
	return meta, listed, expect(dec, '}') // without its end, it broke off
}

func eachItem[T any](dec *json.Decoder, in *capped, each func(T) error) error {
	start, err := dec.Token()
	if err != nil || start == nil { // an empty list may be null
		return err
	}
	if start != json.Delim('[') {
		return errors.New("its items are not a list")
	}
	for dec.More() {
		in.next()
		var item T
		if err := dec.Decode(&item); err != nil {
			return err
		}
		if err := each(item); err != nil {
			return err
		}
	}
	return expect(dec, ']')
}

func expect(dec *json.Decoder, want json.Delim) error {
	got, err := dec.Token()
	switch {
	case errors.Is(err, io.EOF):
		return io.ErrUnexpectedEOF
	case err != nil:
		return err
	case got != want:
		return errors.New("it is not a list")
	}
	return nil
}

// capped bounds how much is read for one object.
type capped struct {
	r    io.Reader
	left int
}

// next begins another object.
func (c *capped) next() { c.left = maxObject }

func (c *capped) Read(p []byte) (int, error) {
	if c.left <= 0 {
		return 0, fmt.Errorf("an object is above %d bytes", maxObject)
	}
	n, err := c.r.Read(p[:min(len(p), c.left)])
	c.left -= n
	return n, err
}
