// Command bot asks for two orders and prints what became of them. It holds no
// key and opens no connection: inkan run gave it one to its signer. Built
// with CGO_ENABLED=0 it is static and needs nothing but itself; this one uses the
// standard library alone, and signer/client does the same in one call.
package main

import (
	"bufio"
	"crypto/rand"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"log"
	"net"
	"net/http"
	"os"
	"strconv"
	"strings"
)

func main() {
	fd, err := strconv.Atoi(os.Getenv("INKAN_FD"))
	if err != nil {
		log.Fatal("start me with inkan run: INKAN_FD is not set")
	}
	signer, err := net.FileConn(os.NewFile(uintptr(fd), "signer"))
	if err != nil {
		log.Fatal(err)
	}
	answers := bufio.NewReader(signer)
	for _, quantity := range []string{"400", "4000"} { // the second is worth more than the scope allows
		id := make([]byte, 16)
		rand.Read(id) // never fails
		action := fmt.Sprintf(`{"id":%q,"aud":"XPAR","act":"order.new","ord":{"ClOrdID":"A-%s","SecurityID":"FR0000120271","SecurityIDSource":"4","Side":"1","OrdType":"2","Price":"61.24","OrderQty":%q,"Currency":"EUR","TimeInForce":"0"}}`,
			base64.RawURLEncoding.EncodeToString(id), quantity, quantity)
		req, err := http.NewRequest("POST", "http://signer/v1/actions", strings.NewReader(action))
		if err == nil {
			err = req.Write(signer)
		}
		if err != nil {
			log.Fatal(err)
		}
		res, err := http.ReadResponse(answers, req)
		if err != nil {
			log.Fatal(err)
		}
		var result struct {
			Counter           uint64
			JWS, Rule, Detail string
		}
		if err := json.NewDecoder(res.Body).Decode(&result); err != nil {
			log.Fatal(err)
		}
		if res.StatusCode == http.StatusOK {
			fmt.Printf("signed as number %d for the venue: %.40s...\n", result.Counter, result.JWS)
		} else {
			fmt.Printf("refused: %s: %s\n", result.Rule, result.Detail)
		}
	}
}
