package approver_test

import (
	"bufio"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"
	"time"
)

// TestManyAtATime: what one agent sends is read a few requests at a time, so
// that it does not take the memory that others need.
func TestManyAtATime(t *testing.T) {
	d := newDesk(t)
	url, _ := d.serve(t, d.key, d.record)
	own := d.tlsAgent(t, d.agent.ID)
	d.client = own.Chain[0]
	config := &tls.Config{InsecureSkipVerify: true, Certificates: []tls.Certificate{{Certificate: [][]byte{own.Chain[0].Raw}, PrivateKey: own.Key}}}
	stranger := d.ca.Agent(t, "somebody", []byte(scopeJSON), func(c *x509.Certificate) {
		c.UnknownExtKeyUsage, c.ExtKeyUsage, c.ExtraExtensions = nil, []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}, nil
	})
	others := &tls.Config{InsecureSkipVerify: true, Certificates: []tls.Certificate{{Certificate: [][]byte{stranger.Chain[0].Raw}, PrivateKey: stranger.Key}}}
	for _, x := range []struct {
		name string
		c    *tls.Config
	}{{"somebody who is no agent here", others}, {"an agent", config}} {
		var asked atomic.Int32 // for bodies, which never come
		for range 40 {
			conn, err := tls.Dial("tcp", strings.TrimPrefix(url, "https://"), x.c)
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			if _, err := fmt.Fprintf(conn, "POST /v1/entries HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 4000000\r\n\r\n"); err != nil {
				t.Fatal(err)
			}
			go func() {
				if line, err := bufio.NewReader(conn).ReadString('\n'); err == nil && strings.Contains(line, " 100 ") {
					asked.Add(1)
				}
			}()
		}
		time.Sleep(time.Second)
		if n := asked.Load(); n == 0 || n > 8 {
			t.Errorf("%d requests of %s are read at a time, 1 to 8 are expected", n, x.name)
		}
		if x.c == config {
			continue
		}
		agent := &http.Client{Timeout: 10 * time.Second, Transport: &http.Transport{TLSClientConfig: config}}
		if status, answer, err := post(agent, url+"/v1/authorizations", mustJSON(d.request(d.write(t, d.next(t, "1", nil))))); status != http.StatusOK {
			t.Errorf("an agent meanwhile: %d %s %v", status, answer, err)
		}
	}
}
