package image

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strconv"
)

// Client uses the store of a running server through its Handler. Its methods
// are those of Local, WithProgress included.
type Client struct {
	HTTP *http.Client // connects to where the Handler is served
	Base string       // URL up to /images, like http://tutti
}

// List returns all images in the order of their names.
func (c *Client) List(ctx context.Context) ([]Image, error) {
	m, err := c.do(ctx, http.MethodGet, "/images", nil, nil)
	return m.Images, err
}

// Load takes in the images of an archive; see Local.Load.
func (c *Client) Load(ctx context.Context, r io.Reader) ([]Image, error) {
	m, err := c.do(ctx, http.MethodPost, "/images/load", nil, r)
	return m.Images, err
}

// Import makes an image of a root file system; see Local.Import.
func (c *Client) Import(ctx context.Context, name string, r io.Reader, cfg Config) (Image, error) {
	config, err := json.Marshal(cfg)
	if err != nil {
		return Image{}, err
	}
	return c.one(ctx, "/images/import", url.Values{"name": {name}, "config": {string(config)}}, r)
}

// Pull fetches and unpacks an image; see Local.Pull.
func (c *Client) Pull(ctx context.Context, name string, auths []Auth) (Image, error) {
	body, err := json.Marshal(auths)
	if err != nil {
		return Image{}, err
	}
	return c.one(ctx, "/images/pull", url.Values{"name": {name}}, bytes.NewReader(body))
}

// Push sends an image to a registry; see Local.Push and Local.PushName. It
// returns where to and the digest.
func (c *Client) Push(ctx context.Context, name, to, namespace string, auths []Auth) (where, digest string, err error) {
	body, err := json.Marshal(auths)
	if err != nil {
		return "", "", err
	}
	img, err := c.one(ctx, "/images/push", url.Values{"name": {name}, "to": {to}, "namespace": {namespace}}, bytes.NewReader(body))
	return img.Name, img.Digest, err
}

// Remove removes an image; see Local.Remove.
func (c *Client) Remove(ctx context.Context, name string, force bool) error {
	_, err := c.do(ctx, http.MethodDelete, "/images", url.Values{"name": {name}, "force": {strconv.FormatBool(force)}}, nil)
	return err
}

// Collect removes what nothing uses; see Local.Collect.
func (c *Client) Collect(ctx context.Context) error {
	_, err := c.do(ctx, http.MethodPost, "/images/collect", nil, nil)
	return err
}

// Save writes an image as an archive; see Local.Save.
func (c *Client) Save(ctx context.Context, name string, w io.Writer) error {
	resp, err := c.send(ctx, http.MethodGet, "/images/save", url.Values{"name": {name}}, nil)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		_, err := last(ctx, resp)
		return err
	}
	if _, err := io.Copy(w, resp.Body); err != nil {
		return fmt.Errorf("save image %s: %w", name, err)
	}
	return nil
}

func (c *Client) one(ctx context.Context, path string, query url.Values, body io.Reader) (Image, error) {
	m, err := c.do(ctx, http.MethodPost, path, query, body)
	if err != nil || len(m.Images) == 0 {
		return Image{}, err
	}
	return m.Images[0], nil
}

func (c *Client) do(ctx context.Context, method, path string, query url.Values, body io.Reader) (message, error) {
	src := &source{Reader: body, failed: make(chan error, 1)}
	if body != nil {
		body = src
	}
	resp, err := c.send(ctx, method, path, query, body)
	var m message
	if err == nil {
		defer resp.Body.Close()
		m, err = last(ctx, resp)
	}
	select {
	case failed := <-src.failed: // what followed, a broken connection, says less
		return message{}, fmt.Errorf("read what to send: %w", failed)
	default:
		return m, err
	}
}

// source remembers why the body of a request could not be read. It hides the
// body's Close: the caller closes what it has opened.
type source struct {
	io.Reader
	failed chan error
}

func (s *source) Read(b []byte) (int, error) {
	n, err := s.Reader.Read(b)
	if err != nil && err != io.EOF {
		select {
		case s.failed <- err:
		default:
		}
	}
	return n, err
}

func (c *Client) send(ctx context.Context, method, path string, query url.Values, body io.Reader) (*http.Response, error) {
	req, err := http.NewRequestWithContext(ctx, method, c.Base+path+"?"+query.Encode(), body)
	if err != nil {
		return nil, err
	}
	resp, err := c.HTTP.Do(req)
	if err != nil {
		return nil, fmt.Errorf("ask the server: %w", err)
	}
	return resp, nil
}

// last reads messages until the one that ends the answer.
func last(ctx context.Context, resp *http.Response) (message, error) {
	report, _ := ctx.Value(progressKey{}).(func(Progress))
	for lines := json.NewDecoder(resp.Body); ; {
		var m message
		if err := lines.Decode(&m); errors.Is(err, io.EOF) {
			return m, errors.New("the server ended its answer too early")
		} else if err != nil {
			return m, fmt.Errorf("read the server's answer: %w", err)
		}
		switch {
		case m.Error != nil:
			return m, m.Error.local()
		case m.Progress == nil:
			return m, nil
		case report != nil:
			report(*m.Progress)
		}
	}
}
