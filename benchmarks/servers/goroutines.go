// A goroutine for each connection, as the standard library of Go has it.
//
// goroutines echo|lines|datagrams|web
//
// Prints the port that the kernel chose.
package main

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
)

func main() {
	role := ""
	if len(os.Args) == 2 {
		role = os.Args[1]
	}
	switch role {
	case "echo":
		serveStreams(echo)
	case "lines":
		serveStreams(echoLines)
	case "datagrams":
		serveDatagrams()
	case "web":
		serveWeb()
	default:
		fmt.Fprintln(os.Stderr, "usage: goroutines echo|lines|datagrams|web")
		os.Exit(2)
	}
}

func listen() net.Listener {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		panic(err)
	}
	fmt.Println(listener.Addr().(*net.TCPAddr).Port)
	return listener
}

func serveStreams(handle func(net.Conn)) {
	listener := listen()
	for {
		connection, err := listener.Accept()
		if err != nil {
			panic(err)
		}
		go func() {
			defer connection.Close()
			handle(connection)
		}()
	}
}

func echo(connection net.Conn) {
	buffer := make([]byte, 65536)
	for {
		size, err := connection.Read(buffer)
		if err != nil {
			return
		}
		connection.Write(buffer[:size])
	}
}

func echoLines(connection net.Conn) {
	reader := bufio.NewReader(connection)
	for {
		line, err := reader.ReadSlice('\n')
		if err != nil {
			return
		}
		connection.Write(line)
	}
}

func serveDatagrams() {
	bound, err := net.ListenUDP("udp", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		panic(err)
	}
	fmt.Println(bound.LocalAddr().(*net.UDPAddr).Port)
	buffer := make([]byte, 65536)
	for {
		size, peer, err := bound.ReadFromUDPAddrPort(buffer)
		if err == nil {
			bound.WriteToUDPAddrPort(buffer[:size], peer)
		}
	}
}

func serveWeb() {
	http.Serve(listen(), http.HandlerFunc(func(reply http.ResponseWriter, _ *http.Request) {
		reply.Header().Set("Content-Type", "text/plain")
		io.WriteString(reply, "Hello, world!\n")
	}))
}
