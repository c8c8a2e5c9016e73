package signer_test

import (
	"bufio"
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os/exec"
	"strings"
	"testing"
	"time"

	"inkan/internal/problem"
	"inkan/internal/testca"
	"inkan/scope"
	"inkan/signer"
	"inkan/signer/client"
)

// brokenDevice has a key and does not sign.
type brokenDevice struct{ crypto.Signer }

var errInside = errors.New("planted: /usr/lib/module.so in slot 7: CKR_DEVICE_ERROR")

func (brokenDevice) Sign(io.Reader, []byte, crypto.SignerOpts) ([]byte, error) { return nil, errInside }

// TestInsideStaysInside: what the device said is in the signer's log, and not in
// the answer.
func TestInsideStaysInside(t *testing.T) {
	self, _ := executables(t)
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	d := startWith(t, agent("a", self), nil, map[string]*testca.Agent{"a": {Key: brokenDevice{key}}})
	c := client.New(d.socket)
	_, action := c.SignJSON(context.Background(), order(client.NewID()))
	head := c.Post(context.Background(), "/v1/checkpoint", struct{}{}, new(struct{}))
	for what, err := range map[string]error{"an action": action, "the record's head": head} {
		p, ok := errors.AsType[*problem.Problem](err)
		if !ok || scope.Rule(p.Rule) != signer.RuleDevice || strings.Contains(fmt.Sprint(p), "planted") {
			t.Errorf("%s: %v", what, err)
		}
	}
	if n := strings.Count(d.log.String(), "planted"); n != 2 {
		t.Errorf("the log names the cause %d times: %s", n, d.log)
	}
}

// TestStrangersBody: a process that was passed the descriptor sends the body of a
// request that the agent has begun: nothing is signed.
func TestStrangersBody(t *testing.T) {
	self, _ := executables(t)
	d := start(t, agent("a", self))
	c, err := net.Dial("unix", d.socket)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	body := order(client.NewID())
	if _, err := fmt.Fprintf(c, "POST /v1/actions HTTP/1.1\r\nHost: signer\r\nContent-Length: %d\r\n\r\n", len(body)); err != nil {
		t.Fatal(err)
	}
	time.Sleep(100 * time.Millisecond) // it is looked at by then
	f, err := c.(*net.UnixConn).File()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("cat")
	cmd.Stdin, cmd.Stdout = bytes.NewReader(body), f
	if err := errors.Join(cmd.Run(), f.Close()); err != nil {
		t.Fatal(err)
	}
	res, err := http.ReadResponse(bufio.NewReader(c), nil)
	if err != nil {
		t.Fatal(err)
	}
	answer, err := io.ReadAll(res.Body)
	if err != nil {
		t.Fatal(err)
	}
	if p := problem.Parse(res.StatusCode, res.Header.Get("Content-Type"), answer); p.Rule != string(signer.RuleCaller) {
		t.Errorf("got %s %s", res.Status, answer)
	}
	if n := d.entries(t, "a"); n != 0 {
		t.Errorf("the record has %d entries", n)
	}
}
