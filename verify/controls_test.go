package verify_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"inkan/scope"
	"inkan/verify"
)

// controlledVenue is a venue and an agent whose scope has a controller.
func controlledVenue(t *testing.T) (*venue, *ecdsa.PrivateKey) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	text, err := scope.ControllerKey(&key.PublicKey)
	if err != nil {
		t.Fatal(err)
	}
	v := newVenue(t)
	raw := strings.Replace(scopeJSON, `"max_order_notional"`, fmt.Sprintf(`"controllers":[{"key":%q,"may":["policy"],"name":"risk"}],"max_order_notional"`, text), 1)
	if v.scope, err = scope.ParseCanonical([]byte(raw)); err != nil {
		t.Fatal(err)
	}
	v.agent = v.ca.Agent(t, "a", []byte(raw), nil)
	return v, key
}

func reason(t *testing.T, what string, want verify.Reason, err error) {
	t.Helper()
	r, ok := errors.AsType[*verify.Refusal](err)
	if want == "" && err != nil || want != "" && (!ok || r.Reason != want) {
		t.Errorf("%s: %v, %q is expected", what, err, want)
	}
}

func TestPolicies(t *testing.T) {
	v, key := controlledVenue(t)
	now := time.Now().UTC().Truncate(time.Second)
	sign := func(key *ecdsa.PrivateKey, agent, amount string, issued time.Time) string {
		s, err := scope.Parse([]byte(strings.Replace(scopeJSON, `"25000"`, `"`+amount+`"`, 1)))
		if err != nil {
			t.Fatal(err)
		}
		text, err := scope.SignPolicy(key, agent, 1, s, issued, issued.Add(time.Hour))
		if err != nil {
			t.Fatal(err)
		}
		return text
	}
	other, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	good := sign(key, v.agent.ID, "5000", now)
	policies := map[string]struct {
		text string
		want verify.Reason
	}{
		"inside":             {good, ""},
		"smaller than this":  {sign(key, v.agent.ID, "4999", now), verify.ReasonScope},
		"wider":              {sign(key, v.agent.ID, "25001", now), verify.ReasonPolicy},
		"of nobody":          {sign(other, v.agent.ID, "5000", now), verify.ReasonPolicy},
		"of another agent":   {sign(key, v.agent.ID+"x", "5000", now), verify.ReasonPolicy},
		"that has ended":     {sign(key, v.agent.ID, "5000", now.Add(-2*time.Hour)), verify.ReasonPolicy},
		"that has not begun": {sign(key, v.agent.ID, "5000", now.Add(time.Hour)), verify.ReasonPolicy},
		"that is none":       {"policy", verify.ReasonPolicy},
	}
	dir := t.TempDir()
	served := make(map[string]string)
	n := 0
	for _, p := range policies {
		n++
		if err := os.WriteFile(filepath.Join(dir, fmt.Sprint(n)), []byte(p.text+"\n"), 0o600); err != nil {
			t.Fatal(err)
		}
		sum := sha256.Sum256([]byte(p.text))
		served["/"+base64.RawURLEncoding.EncodeToString(sum[:])] = p.text
	}
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if text, ok := served[r.URL.Path]; ok {
			fmt.Fprintln(w, text)
			return
		}
		w.WriteHeader(http.StatusNotFound)
	}))
	defer server.Close()
	under := func(text string) string {
		sum := scope.Digest(sha256.Sum256([]byte(text)))
		return v.action(t, func(s *scope.Statement) { s.Decision.Policy = &sum })
	}
	for name, source := range map[string]verify.Policies{"directory": &verify.PolicyDir{Path: dir}, "URL": verify.PolicyURL(server.URL)} {
		v.config.Policies = source
		r := v.receiver(t)
		for range 2 { // the second time from memory
			for what, p := range policies {
				_, err := r.Verify(t.Context(), []byte(under(p.text)), nil)
				reason(t, name+": a policy "+what, p.want, err)
			}
		}
		_, err := r.Verify(t.Context(), []byte(under("unknown")), nil)
		reason(t, name+": an unknown policy", verify.ReasonPolicy, err)
	}
	v.config.Policies = nil
	_, err = v.receiver(t).Verify(t.Context(), []byte(under(good)), nil)
	reason(t, "without a source", verify.ReasonPolicy, err)
	v.config.Policies = verify.NoPolicies{}
	_, err = v.receiver(t).Verify(t.Context(), []byte(under("unknown")), nil)
	reason(t, "not looked at", "", err)
}

func TestKills(t *testing.T) {
	v := newVenue(t)
	now := time.Now().UTC().Truncate(time.Second)
	var text string
	var fails error
	number := scope.Counter(1)
	publish := func(change func(*scope.KillList), kills ...scope.IssuedKill) {
		t.Helper()
		number++
		l := &scope.KillList{Number: number, ThisUpdate: now, NextUpdate: now.Add(time.Hour), Kills: append([]scope.IssuedKill{}, kills...)}
		if change != nil {
			change(l)
		}
		var err error
		if text, err = l.Sign(v.ca.Key); err != nil {
			t.Fatal(err)
		}
	}
	try := func(what string, want verify.Reason, change func(*scope.Statement)) {
		t.Helper()
		v.config.Kills = &verify.KillList{MaxAge: time.Minute, Load: func(context.Context) ([]byte, error) { return []byte(text + "\n"), fails }}
		_, err := v.receiver(t).Verify(t.Context(), []byte(v.action(t, change)), nil)
		reason(t, what, want, err)
	}
	kill := scope.IssuedKill{ID: "k1", Scope: scope.KillAgent, Agent: v.agent.ID, Reason: "runs wild", Since: now}
	publish(nil)
	try("nobody is stopped", "", nil)
	publish(nil, kill)
	try("the agent is stopped", verify.ReasonKilled, nil)
	try("and cancels", "", func(s *scope.Statement) {
		s.Kind, s.Order, s.Decision.Notional = scope.OrderCancel, &scope.Order{ClOrdID: "2", OrigClOrdID: "1", SecurityID: "FR0000120271", SecurityIDSource: "4", Side: "1"}, nil
	})
	another, venue, elsewhere := kill, kill, kill
	another.Agent += "x"
	venue.Scope, venue.Agent, venue.Venue = scope.KillVenue, "", "XPAR"
	elsewhere.Scope, elsewhere.Venue = scope.KillVenue, "XLON"
	publish(nil, another, elsewhere)
	try("another agent and another venue are stopped", "", nil)
	publish(nil, venue)
	try("the venue is stopped", verify.ReasonKilled, nil)
	publish(nil, scope.IssuedKill{ID: "k2", Scope: scope.KillFirm, Reason: "drill", Since: now})
	try("all are stopped", verify.ReasonKilled, nil)
	publish(func(l *scope.KillList) { l.ThisUpdate = now.Add(-2 * time.Minute) })
	try("an old list", verify.ReasonKillState, nil)
	publish(func(l *scope.KillList) { l.ThisUpdate, l.NextUpdate = now.Add(-30*time.Second), now.Add(-time.Second) })
	try("a list after its next update", verify.ReasonKillState, nil)
	fails = errors.New("no route")
	try("no list", verify.ReasonKillState, nil)
	fails = nil
	publish(nil)
	parts := strings.Split(text, ".")
	text = parts[0] + "." + parts[1] + "." + strings.Repeat("A", len(parts[2]))
	try("a list with another signature", verify.ReasonKillState, nil)

	// A list that is older than the one before does not take its place.
	publish(nil, kill)
	newer := text
	list := &verify.KillList{MaxAge: time.Minute, Reload: time.Nanosecond, Load: func(context.Context) ([]byte, error) { return []byte(text), nil }}
	issuer := v.ca.Certificate
	reason(t, "the newer list", verify.ReasonKilled, list.Check(t.Context(), v.agent.ID, "XPAR", issuer, now.Add(time.Second)))
	number = 1
	publish(nil)
	reason(t, "the older list", verify.ReasonKilled, list.Check(t.Context(), v.agent.ID, "XPAR", issuer, now.Add(3*time.Second)))
	if newer == text {
		t.Fatal("there is one list")
	}
}
