package issuer

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strings"
	"syscall"
	"time"

	"inkan/attest"
	"inkan/internal/problem"
	"inkan/internal/strictjson"
	"inkan/scope"
)

// Client calls an issuer's administrators' API. It is safe for concurrent use.
type Client struct {
	http *http.Client
	base string
}

// NewClient returns a client for the API at base with an administrator's certificate.
func NewClient(base string, ca *x509.Certificate, admin tls.Certificate) *Client {
	return &Client{base: strings.TrimSuffix(base, "/"), http: &http.Client{Timeout: 30 * time.Second, Transport: &http.Transport{
		TLSClientConfig: &tls.Config{MinVersion: tls.VersionTLS13, RootCAs: pool(certs(ca)), Certificates: []tls.Certificate{admin}},
	}}}
}

func certs(c ...*x509.Certificate) []*x509.Certificate { return c }

func (c *Client) call(ctx context.Context, method, path string, in, out any) error {
	var body io.Reader
	if in != nil {
		b, err := strictjson.Marshal(in)
		if err != nil {
			return err
		}
		body = bytes.NewReader(b)
	}
	req, err := http.NewRequestWithContext(ctx, method, c.base+path, body)
	if err != nil {
		return err
	}
	res, err := c.http.Do(req)
	if errors.Is(err, syscall.ECONNREFUSED) {
		return fmt.Errorf("asking the issuer: %w: is it running, and is this its administrators' address?", err)
	}
	if err != nil {
		return fmt.Errorf("asking the issuer: %w", err)
	}
	defer res.Body.Close()
	b, err := io.ReadAll(io.LimitReader(res.Body, 16<<20))
	if err != nil {
		return fmt.Errorf("reading the issuer's answer: %w", err)
	}
	if res.StatusCode/100 != 2 {
		return problem.Parse(res.StatusCode, res.Header.Get("Content-Type"), b)
	}
	if out == nil {
		return nil
	}
	return strictjson.Unmarshal(b, 16<<20, out)
}

// AddDevice adds a device to the inventory.
func (c *Client) AddDevice(ctx context.Context, d Device) error {
	return c.call(ctx, http.MethodPost, "/v1/devices", d, nil)
}

// Devices lists the inventory's devices.
func (c *Client) Devices(ctx context.Context) (out []Device, err error) {
	return out, c.call(ctx, http.MethodGet, "/v1/devices", nil, &out)
}

// ResetAudit forgets what a device's TPM testified of its signatures: what it
// testifies next is held against nothing.
func (c *Client) ResetAudit(ctx context.Context, id string) error {
	return c.call(ctx, http.MethodDelete, "/v1/devices/"+url.PathEscape(id)+"/testimony", nil, nil)
}

// SetEpoch demands that a device's epoch counter be at least n from its next
// enrolment or renewal on. It is not taken back.
func (c *Client) SetEpoch(ctx context.Context, id string, n uint64) error {
	return c.call(ctx, http.MethodPost, "/v1/devices/"+url.PathEscape(id)+"/epoch", attest.EpochDemand{AtLeast: n}, nil)
}

// RemoveDevice removes a device whose agents are retired.
func (c *Client) RemoveDevice(ctx context.Context, id string) error {
	return c.call(ctx, http.MethodDelete, "/v1/devices/"+url.PathEscape(id), nil, nil)
}

// AddAgent adds an agent; Scope may be any JSON spelling.
func (c *Client) AddAgent(ctx context.Context, a Agent) error {
	return c.call(ctx, http.MethodPost, "/v1/agents", a, nil)
}

// Agents lists the agents.
func (c *Client) Agents(ctx context.Context) (out []Agent, err error) {
	return out, c.call(ctx, http.MethodGet, "/v1/agents", nil, &out)
}

// SetStatus suspends, resumes or retires an agent.
func (c *Client) SetStatus(ctx context.Context, name, status string) error {
	return c.call(ctx, http.MethodPost, "/v1/agents/"+url.PathEscape(name)+"/status", map[string]string{"status": status}, nil)
}

// AddPolicy adds an approved policy.
func (c *Client) AddPolicy(ctx context.Context, p Policy) error {
	return c.call(ctx, http.MethodPost, "/v1/policies", p, nil)
}

// RetirePolicy takes a policy out of force for enrolments and renewals.
func (c *Client) RetirePolicy(ctx context.Context, name string) error {
	return c.call(ctx, http.MethodPost, "/v1/policies/"+url.PathEscape(name)+"/retire", nil, nil)
}

// Policies lists the approved policies, the newest first.
func (c *Client) Policies(ctx context.Context) (out []Policy, err error) {
	return out, c.call(ctx, http.MethodGet, "/v1/policies", nil, &out)
}

// Certificates lists certificates, the newest first; agent may be empty.
func (c *Client) Certificates(ctx context.Context, agent string) (out []Certificate, err error) {
	return out, c.call(ctx, http.MethodGet, "/v1/certificates?agent="+url.QueryEscape(agent), nil, &out)
}

// Revoke revokes a certificate for a reason of Reasons.
func (c *Client) Revoke(ctx context.Context, serial, reason string) error {
	return c.call(ctx, http.MethodPost, "/v1/certificates/"+url.PathEscape(serial)+"/revoke", map[string]string{"reason": reason}, nil)
}

// Events lists the decision log after an event's id.
func (c *Client) Events(ctx context.Context, after int64) (out []Event, err error) {
	return out, c.call(ctx, http.MethodGet, fmt.Sprintf("/v1/events?after=%d", after), nil, &out)
}

// Kill stops an agent, a venue or all agents.
func (c *Client) Kill(ctx context.Context, o KillOrder) (*scope.IssuedKill, error) {
	var out scope.IssuedKill
	return &out, c.call(ctx, http.MethodPost, "/v1/kills", o, &out)
}

// Kills lists the kills in force.
func (c *Client) Kills(ctx context.Context) (out []scope.IssuedKill, err error) {
	return out, c.call(ctx, http.MethodGet, "/v1/kills", nil, &out)
}

// LiftKill takes a kill off the list.
func (c *Client) LiftKill(ctx context.Context, id string) error {
	return c.call(ctx, http.MethodDelete, "/v1/kills/"+url.PathEscape(id), nil, nil)
}
