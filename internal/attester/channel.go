package attester

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strings"
	"sync"
	"time"

	"inkan/attest"
	"inkan/internal/problem"
	"inkan/internal/strictjson"
)

// maxAnswer bounds an answer of the issuer, in bytes.
const maxAnswer = 1 << 20

// Channel is one TLS 1.3 connection to the issuer. The evidence names it by
// its exporter, so all messages of an exchange go over this one connection.
type Channel struct {
	client *http.Client
	base   string
	conn   *tls.Conn
}

// Dial connects to the issuer at base, an https URL.
func Dial(ctx context.Context, base string, roots *x509.CertPool) (*Channel, error) {
	u, err := url.Parse(base)
	if err != nil || u.Scheme != "https" || u.Host == "" {
		return nil, fmt.Errorf("issuer URL %q: an https URL is expected", base)
	}
	address := u.Host
	if u.Port() == "" {
		address = net.JoinHostPort(u.Hostname(), "443")
	}
	d := tls.Dialer{
		NetDialer: &net.Dialer{Timeout: 10 * time.Second},
		Config:    &tls.Config{MinVersion: tls.VersionTLS13, RootCAs: roots, ServerName: u.Hostname(), NextProtos: []string{"http/1.1"}},
	}
	c, err := d.DialContext(ctx, "tcp", address)
	if err != nil {
		return nil, fmt.Errorf("connecting to the issuer at %s: %w", address, err)
	}
	conn := c.(*tls.Conn)
	var once sync.Once
	tr := &http.Transport{
		MaxConnsPerHost: 1,
		DialTLSContext: func(context.Context, string, string) (net.Conn, error) {
			var first net.Conn
			once.Do(func() { first = conn })
			if first == nil {
				return nil, errors.New("the issuer closed the connection that the evidence is bound to")
			}
			return first, nil
		},
	}
	return &Channel{client: &http.Client{Transport: tr, Timeout: time.Minute}, base: strings.TrimSuffix(base, "/"), conn: conn}, nil
}

// Binding is the TLS exporter that the evidence carries (RFC 9266 in spirit,
// RFC 8446 section 7.5), 32 bytes.
func (c *Channel) Binding() ([]byte, error) {
	s := c.conn.ConnectionState()
	return s.ExportKeyingMaterial(attest.BindingLabel, nil, 32)
}

// Post sends in and decodes the answer into out. A refusal is a *problem.Problem.
func (c *Channel) Post(ctx context.Context, path string, in, out any) error {
	body, err := strictjson.Marshal(in)
	if err != nil {
		return err
	}
	answer, err := c.send(ctx, path, "application/json", body)
	if err != nil {
		return err
	}
	if err := strictjson.Unmarshal(answer, maxAnswer, out); err != nil {
		return fmt.Errorf("the issuer's answer: %w", err)
	}
	return nil
}

// PostLines sends JSON lines. A refusal is a *problem.Problem.
func (c *Channel) PostLines(ctx context.Context, path string, lines []byte) error {
	_, err := c.send(ctx, path, "application/jsonl", lines)
	return err
}

func (c *Channel) send(ctx context.Context, path, contentType string, body []byte) ([]byte, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, c.base+path, bytes.NewReader(body))
	if err != nil {
		return nil, err
	}
	req.Header.Set("Content-Type", contentType)
	res, err := c.client.Do(req)
	if err != nil {
		return nil, fmt.Errorf("asking the issuer: %w", err)
	}
	defer res.Body.Close()
	answer, err := io.ReadAll(io.LimitReader(res.Body, maxAnswer+1))
	if err != nil {
		return nil, fmt.Errorf("reading the issuer's answer: %w", err)
	}
	if res.StatusCode/100 != 2 {
		return nil, fmt.Errorf("the issuer: %w", problem.Parse(res.StatusCode, res.Header.Get("Content-Type"), answer))
	}
	return answer, nil
}

// Close closes the connection.
func (c *Channel) Close() { c.client.CloseIdleConnections(); _ = c.conn.Close() }
