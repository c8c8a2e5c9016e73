// Package client asks a signer for signatures: [New] a [Client] for the socket
// of the one on this host, or [NewRemote] for one elsewhere; [Client.Sign] an action.
package client

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/tls"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"net/url"
	"strings"
	"syscall"
	"time"

	"inkan/internal/problem"
	"inkan/internal/strictjson"
	"inkan/scope"
)

// maxAnswer bounds an answer of the signer, in bytes: the status of an agent with
// all that it has takes some hundred thousand.
const maxAnswer = 64 << 20

// Client asks a signer. It is safe for concurrent use.
type Client struct {
	http  *http.Client
	base  string
	token func() (string, error) // nil: the connection says who asks
}

// New returns a client for the signer's socket.
func New(socket string) *Client {
	return &Client{base: "http://signer", http: &http.Client{Timeout: 2 * time.Minute, Transport: &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", socket)
		},
		MaxIdleConns: 64, MaxIdleConnsPerHost: 64, DisableCompression: true,
	}}}
}

// NewRemote returns a client for a signer on another host, such as
// https://signer.example.org:8444. The configuration has the authorities of the
// signer's certificate, and the workload's X.509-SVID in Certificates or
// GetClientCertificate. Without one, token, which may be nil, returns a JWT-SVID for each request.
func NewRemote(url string, c *tls.Config, token func() (string, error)) (*Client, error) {
	if !strings.HasPrefix(url, "https://") || c == nil {
		return nil, errors.New("the signer's address: an https URL and a TLS configuration are expected")
	}
	c = c.Clone()
	c.MinVersion = tls.VersionTLS13
	return &Client{base: strings.TrimRight(url, "/"), token: token, http: &http.Client{Timeout: 2 * time.Minute, Transport: &http.Transport{
		TLSClientConfig: c, TLSHandshakeTimeout: 10 * time.Second, IdleConnTimeout: time.Minute, MaxIdleConns: 64, MaxIdleConnsPerHost: 64, DisableCompression: true,
	}}}, nil
}

// Signed is a signed action.
type Signed struct {
	ID      string `json:"id"`
	Counter uint64 `json:"counter"`
	JWS     string `json:"jws"`
}

// NewID returns a fresh action id: 16 random bytes in base64url.
func NewID() string {
	var b [16]byte
	_, _ = rand.Read(b[:]) // it ends the program before it would return an error
	return base64.RawURLEncoding.EncodeToString(b[:])
}

// Sign has an action signed. A refusal is a *[problem.Problem] whose Rule
// names what refused. The same action may be sent again after a failure: its
// id makes sure that it is recorded once.
func (c *Client) Sign(ctx context.Context, a *scope.Action, authorizations ...string) (*Signed, error) {
	b, err := a.Canonical()
	if err != nil {
		return nil, err
	}
	return c.SignJSON(ctx, b, authorizations...)
}

// authorizationHeader carries what a controller signed for an action.
const authorizationHeader = "Agent-Authorization"

// SignJSON is Sign for an action in JSON, which it does not look into.
// authorizations are what controllers signed for it: an override, an approval.
func (c *Client) SignJSON(ctx context.Context, action []byte, authorizations ...string) (*Signed, error) {
	var out Signed
	return &out, c.do(ctx, http.MethodPost, "/v1/actions", http.Header{authorizationHeader: authorizations}, action, &out)
}

// Post sends an operator's request, such as /v1/kill, as JSON, and reads the answer into out.
func (c *Client) Post(ctx context.Context, path string, v, out any) error {
	body, err := strictjson.Marshal(v)
	if err != nil {
		return err
	}
	return c.call(ctx, http.MethodPost, path, body, out)
}

// Checkpoint has the device sign the head of the agent's record, into out.
func (c *Client) Checkpoint(ctx context.Context, out any) error {
	return c.call(ctx, http.MethodPost, "/v1/checkpoint", nil, out)
}

// Recover has the signer take an agent's record up again about which something was
// found, for an operator, into out.
func (c *Client) Recover(ctx context.Context, agent, reason string, out any) error {
	body, err := strictjson.Marshal(map[string]string{"reason": reason})
	if err != nil {
		return err
	}
	return c.call(ctx, http.MethodPost, "/v1/agents/"+url.PathEscape(agent)+"/recovery", body, out)
}

// Get asks for a document of the signer, such as /v1/agent, into out.
func (c *Client) Get(ctx context.Context, path string, out any) error {
	return c.call(ctx, http.MethodGet, path, nil, out)
}

// Acknowledged is the answer to an acknowledgement: the number of its entry in
// the record, or what refused it.
type Acknowledged struct {
	Counter scope.Counter `json:"counter,omitzero"`
	Rule    scope.Rule    `json:"rule,omitzero"`
	Detail  string        `json:"detail,omitzero"`
}

// Acknowledge says, as an operator, which orders of an agent have ended. The
// answers come in the order of the acknowledgements.
func (c *Client) Acknowledge(ctx context.Context, agent string, list ...*scope.Acknowledgement) ([]Acknowledged, error) {
	type one struct {
		Venue   string          `json:"venue"`
		ClOrdID string          `json:"ClOrdID"`
		Status  scope.AckStatus `json:"status"`
		Time    scope.Timestamp `json:"time"`
	}
	all := make([]one, len(list))
	for i, k := range list {
		all[i] = one{k.Venue, k.ClOrdID, k.Status, k.Time}
	}
	body, err := strictjson.Marshal(map[string]any{"agent": agent, "acknowledgements": all})
	if err != nil {
		return nil, err
	}
	var out []Acknowledged
	err = c.call(ctx, http.MethodPost, "/v1/acknowledgements", body, &out)
	return out, err
}

func (c *Client) call(ctx context.Context, method, path string, body []byte, out any) error {
	return c.do(ctx, method, path, nil, body, out)
}

func (c *Client) do(ctx context.Context, method, path string, header http.Header, body []byte, out any) error {
	req, err := http.NewRequestWithContext(ctx, method, c.base+path, bytes.NewReader(body))
	if err != nil {
		return err
	}
	if header != nil {
		req.Header = header
	}
	req.Header.Set("Content-Type", "application/json")
	if c.token != nil {
		token, err := c.token()
		if err != nil {
			return fmt.Errorf("the JWT-SVID: %w", err)
		}
		req.Header.Set("Authorization", "Bearer "+token)
	}
	res, err := c.http.Do(req)
	if err != nil {
		return unanswered(err)
	}
	defer res.Body.Close()
	b, err := io.ReadAll(io.LimitReader(res.Body, maxAnswer+1))
	if err != nil {
		return fmt.Errorf("reading the signer's answer: %w", err)
	}
	if res.StatusCode != http.StatusOK {
		return problem.Parse(res.StatusCode, res.Header.Get("Content-Type"), b)
	}
	return strictjson.Unmarshal(b, maxAnswer, out)
}

// unanswered says that a signer did not answer, and where it was looked for.
func unanswered(err error) error {
	if u, ok := errors.AsType[*url.Error](err); ok {
		err = u.Err // its URL is of no use: the address is below it
	}
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ECONNREFUSED) {
		return fmt.Errorf("asking the signer: %w: is it running, and is this its address?", err)
	}
	return fmt.Errorf("asking the signer: %w", err)
}
