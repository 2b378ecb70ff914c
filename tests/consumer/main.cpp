// The header from C++, linked to the C library: main VERSION
#include <flatmtl.h>

#include <iostream>
#include <string>

int main(int argc, char **argv) {
  if (argc != 2 || std::string(argv[1]) != flatmtl_version()) {
    std::cerr << "version " << flatmtl_version() << ", expected another\n";
    return 1;
  }
  flatmtl_settings settings;
  flatmtl_error error;
  if (flatmtl_settings_default(&settings, &error) != FLATMTL_OK) return 1;
  std::cout << "default method: " << flatmtl_method_name(settings.method) << "\n";
  flatmtl_method method = FLATMTL_SUM;
  return flatmtl_method_by_name("no such method", &method, &error) == FLATMTL_ERROR_NAME ? 0 : 1;
}
